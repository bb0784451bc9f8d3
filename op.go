package quorate

// The bytes of a log entry: what a batch of transactions looks like in raft's log and on the wire between members, and
// the answer that applying it gives. It owns nothing but these bytes and knows nothing else. The batcher encodes, fsm.go
// decodes. Logs keep these bytes for years: testdata/format holds some of every version, and decoding is total, so that
// any committed bytes mean the same on every member.
//
//	entry       format kind body
//	batch       session seq acked sum transactions     kind 1
//	open        nonce[16]                              kind 2
//	term start  (nothing)                              kind 3
//	raise       format [history]                       kind 4, history since format 2
//	transactions count { count { op } }
//	op          kind key [value | version]
//
// Numbers are unsigned varints of encoding/binary, except format, kind and op kind (a byte each) and sum (8 bytes).
// Byte strings are a length and the bytes.

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"unicode/utf8"
)

// Formats of entries and, under the same numbers, of the state that they make. Members write in the one that the state is
// at, so that whoever follows reads it; a raise takes the state to the next one when all of them read it.
const (
	firstFormat   = 1 // a new state begins here on every build: the same log then gives the same rows
	historyFormat = 2 // the state keeps a history
	entryFormat   = 2 // the newest that this code reads
)

// Protocol limits, the same in every build: an entry that breaks one is refused before the log, and applied as invalid by
// every member if it is met in the log all the same.
const (
	maxKey          = 4 << 10   // bytes of a key
	maxValueEver    = 16 << 20  // bytes of a value, whatever Config.MaxValue says
	maxOps          = 128       // operations of one transaction
	maxTransaction  = 512 << 10 // encoded bytes of one transaction, unless only one op of it has a value:
	maxBeside       = 32 << 10  // then encoded bytes without that value
	maxBatch        = 512 << 10 // encoded bytes of one batch, unless its only transaction is larger
	maxTransactions = 4096      // transactions of one batch
	maxEntry        = maxValueEver + 64<<10
)

type entryKind byte

const (
	entryBatch     entryKind = 1
	entryOpen      entryKind = 2
	entryTermStart entryKind = 3
	entryRaise     entryKind = 4
)

// An op is a condition or an effect. The numbers are the format's.
type opKind byte

const (
	opSet          opKind = 1 // effects
	opDelete       opKind = 2
	opAllow        opKind = 3 // key is an address
	opDisallow     opKind = 4
	opIfExists     opKind = 16 // conditions
	opIfNotExists  opKind = 17
	opIfValue      opKind = 18
	opIfNotValue   opKind = 19
	opIfVersion    opKind = 20
	opIfNotVersion opKind = 21
)

func (k opKind) effect() bool     { return k >= opSet && k <= opDisallow }
func (k opKind) condition() bool  { return k >= opIfExists && k <= opIfNotVersion }
func (k opKind) hasValue() bool   { return k == opSet || k == opIfValue || k == opIfNotValue }
func (k opKind) hasVersion() bool { return k == opIfVersion || k == opIfNotVersion }

type op struct {
	kind    opKind
	key     string
	value   []byte
	version uint64
}

// A transaction is what one call submits: all conditions hold and all effects happen, or nothing does.
type transaction []op

// A batch is the transactions that travel in one entry, numbered by the session of the member that sends them.
type batch struct {
	session uint64 // log index of the entry that opened it
	seq     uint64
	acked   uint64 // every seq up to this one is settled at the sender
	sum     [8]byte
	txs     []transaction
}

type entry struct {
	format  uint64
	kind    entryKind
	batch   batch    // entryBatch
	nonce   [16]byte // entryOpen
	raise   uint64   // entryRaise
	history uint64   // entryRaise: changes to keep; 0 = not said
}

var errEntry = errors.New("malformed log entry")

// appendTransaction encodes one transaction; a batch body is the concatenation of these.
func appendTransaction(b []byte, tx transaction) []byte {
	b = binary.AppendUvarint(b, uint64(len(tx)))
	for _, o := range tx {
		b = append(b, byte(o.kind))
		b = binary.AppendUvarint(b, uint64(len(o.key)))
		b = append(b, o.key...)
		switch {
		case o.kind.hasValue():
			b = binary.AppendUvarint(b, uint64(len(o.value)))
			b = append(b, o.value...)
		case o.kind.hasVersion():
			b = binary.AppendUvarint(b, o.version)
		}
	}
	return b
}

// transactionSize is how many bytes appendTransaction appends.
func transactionSize(tx transaction) int {
	size := uvarintSize(uint64(len(tx)))
	for _, o := range tx {
		size += 1 + uvarintSize(uint64(len(o.key))) + len(o.key)
		switch {
		case o.kind.hasValue():
			size += uvarintSize(uint64(len(o.value))) + len(o.value)
		case o.kind.hasVersion():
			size += uvarintSize(o.version)
		}
	}
	return size
}

func uvarintSize(n uint64) int { return (bits.Len64(n|1) + 6) / 7 }

// encodeBatch builds a batch entry from transactions that are encoded already: a batch is sent again with the same body
// and a newer acked, so the sum covers the body alone.
func encodeBatch(format, session, seq, acked uint64, txs [][]byte) []byte {
	size := 2 + 4*binary.MaxVarintLen64 + 8
	for _, tx := range txs {
		size += len(tx)
	}
	b := make([]byte, 0, size)
	b = append(b, byte(format), byte(entryBatch))
	b = binary.AppendUvarint(b, session)
	b = binary.AppendUvarint(b, seq)
	b = binary.AppendUvarint(b, acked)
	at := len(b)
	b = append(b, make([]byte, 8)...)
	b = binary.AppendUvarint(b, uint64(len(txs)))
	for _, tx := range txs {
		b = append(b, tx...)
	}
	sum := sha256.Sum256(b[at+8:])
	copy(b[at:], sum[:8])
	return b
}

func encodeOpen(format uint64, nonce [16]byte) []byte {
	return append([]byte{byte(format), byte(entryOpen)}, nonce[:]...)
}

func encodeTermStart(format uint64) []byte { return []byte{byte(format), byte(entryTermStart)} }

// encodeRaise is written in the format that it raises to: every member reads that, or it is not proposed.
func encodeRaise(format, history uint64) []byte {
	b := binary.AppendUvarint([]byte{byte(format), byte(entryRaise)}, format)
	if format < historyFormat {
		return b
	}
	return binary.AppendUvarint(b, history)
}

// A reader takes fields off the front of bytes; the first one that is not there spoils it, and every later one is zero.
type reader struct {
	b   []byte
	bad bool
}

func (r *reader) byte() byte {
	if len(r.b) == 0 {
		r.bad = true
		return 0
	}
	c := r.b[0]
	r.b = r.b[1:]
	return c
}

func (r *reader) uint() uint64 {
	n, size := binary.Uvarint(r.b)
	if size <= 0 {
		r.bad, r.b = true, nil
		return 0
	}
	r.b = r.b[size:]
	return n
}

// bytes aliases the input.
func (r *reader) bytes(limit int) []byte { return r.raw(r.uint(), limit) }

func (r *reader) raw(n uint64, limit int) []byte {
	if n > uint64(limit) || n > uint64(len(r.b)) {
		r.bad, r.b = true, nil
		return nil
	}
	v := r.b[:n:n]
	r.b = r.b[n:]
	return v
}

// count reads the number of items that follow, each of at least one byte, so that what a length claims is never allocated.
func (r *reader) count(limit int) int {
	n := r.uint()
	if n > uint64(limit) || n > uint64(len(r.b)) {
		r.bad, r.b = true, nil
		return 0
	}
	return int(n)
}

// decodeEntry never panics and never allocates a hundred times len(data). Keys are copied, values alias data.
func decodeEntry(data []byte) (entry, error) {
	r := reader{b: data}
	var e entry
	e.format = uint64(r.byte())
	switch {
	case e.format == 0:
		return e, errEntry
	case e.format > entryFormat:
		return e, fmt.Errorf("%w: a log entry of format %d, and this build reads up to %d: upgrade this member", ErrFormat, e.format, entryFormat)
	}
	e.kind = entryKind(r.byte())
	switch e.kind {
	case entryBatch:
		e.batch = r.batch()
	case entryOpen:
		copy(e.nonce[:], r.raw(uint64(len(e.nonce)), len(e.nonce)))
	case entryTermStart:
	case entryRaise:
		e.raise = r.uint()
		if e.format >= historyFormat {
			e.history = r.uint()
		}
	default:
		return e, fmt.Errorf("%w: kind %d", errEntry, e.kind)
	}
	if r.bad || len(r.b) != 0 {
		return e, errEntry
	}
	return e, nil
}

func (r *reader) batch() batch {
	b := batch{session: r.uint(), seq: r.uint(), acked: r.uint()}
	copy(b.sum[:], r.raw(8, 8))
	if sum := sha256.Sum256(r.b); b.sum != [8]byte(sum[:8]) {
		r.bad = true
	}
	n := r.count(maxTransactions)
	if r.bad {
		return b
	}
	b.txs = make([]transaction, 0, n)
	ops := make(transaction, 0, n) // of all of them; most have one
	for range n {
		before := len(ops)
		ops = r.transaction(ops)
		if r.bad {
			return b
		}
		b.txs = append(b.txs, ops[before:len(ops):len(ops)])
	}
	return b
}

// transaction adds the next one to ops.
func (r *reader) transaction(ops transaction) transaction {
	n := r.count(maxOps)
	ops = slices.Grow(ops, n)
	for range n {
		o := op{kind: opKind(r.byte())}
		o.key = string(r.bytes(maxKey))
		switch {
		case o.kind.hasValue():
			o.value = r.bytes(maxValueEver)
		case o.kind.hasVersion():
			o.version = r.uint()
		}
		if r.bad || !validKey(o.key) || !o.kind.effect() && !o.kind.condition() {
			r.bad = true
			return nil
		}
		ops = append(ops, o)
	}
	return ops
}

// validKey: not empty, valid UTF-8 without NUL, so that SQLite's tools compare and print it, and at most maxKey bytes.
func validKey(key string) bool {
	if key == "" || len(key) > maxKey || !utf8.ValidString(key) {
		return false
	}
	for i := range len(key) {
		if key[i] == 0 {
			return false
		}
	}
	return true
}

// How a transaction ended. The numbers are stored.
type txStatus byte

const (
	txDone        txStatus = 0
	txUnsatisfied txStatus = 1
)

// A result is the answer to one transaction.
type result struct {
	status   txStatus
	revision uint64 // of its last change, or the current one if it changed nothing
	at       uint64 // txUnsatisfied: which op failed
	have     uint64 // txUnsatisfied: version of that op's key, 0 = absent
}

func appendResults(b []byte, rs []result) []byte {
	b = binary.AppendUvarint(b, uint64(len(rs)))
	for _, r := range rs {
		b = append(b, byte(r.status))
		b = binary.AppendUvarint(b, r.revision)
		if r.status == txUnsatisfied {
			b = binary.AppendUvarint(b, r.at)
			b = binary.AppendUvarint(b, r.have)
		}
	}
	return b
}

func (r *reader) results() []result {
	n := r.count(maxTransactions)
	rs := make([]result, 0, n)
	for range n {
		v := result{status: txStatus(r.byte()), revision: r.uint()}
		if v.status == txUnsatisfied {
			v.at, v.have = r.uint(), r.uint()
		}
		rs = append(rs, v)
	}
	return rs
}

// What became of an entry.
type outcomeKind byte

const (
	outcomeDone    outcomeKind = 1 // applied now or before: results (a batch) or session (an open) are the answer
	outcomeGone    outcomeKind = 2 // no effect: the session is not known any more
	outcomeStale   outcomeKind = 3 // no effect: the sender had said that this seq is settled
	outcomeInvalid outcomeKind = 4 // no effect: these bytes mean nothing
)

// An outcome is the state machine's answer to one entry, on the leader that proposed it and to the member that forwarded it.
type outcome struct {
	kind    outcomeKind
	index   uint64 // of the entry that was answered just now; a member that has applied it sees the effects
	term    uint64 // of that entry
	session uint64
	results []result
}

func encodeOutcome(o outcome) []byte {
	return appendOutcome(make([]byte, 0, 64+4*len(o.results)), o)
}

func appendOutcome(b []byte, o outcome) []byte {
	b = append(b, byte(o.kind))
	b = binary.AppendUvarint(b, o.index)
	b = binary.AppendUvarint(b, o.term)
	b = binary.AppendUvarint(b, o.session)
	return appendResults(b, o.results)
}

func decodeOutcome(data []byte) (outcome, error) {
	r := reader{b: data}
	o := outcome{kind: outcomeKind(r.byte()), index: r.uint(), term: r.uint(), session: r.uint(), results: r.results()}
	if r.bad || len(r.b) != 0 || o.kind < outcomeDone || o.kind > outcomeInvalid {
		return outcome{}, errors.New("malformed outcome")
	}
	return o, nil
}
