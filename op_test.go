package quorate

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"pgregory.net/rapid"
)

// encodeEntry is decodeEntry's inverse; the code itself never holds an entry that it did not just build.
func encodeEntry(e entry) []byte {
	format := max(e.format, firstFormat)
	switch e.kind {
	case entryBatch:
		txs := make([][]byte, len(e.batch.txs))
		for i, tx := range e.batch.txs {
			txs[i] = appendTransaction(nil, tx)
		}
		return encodeBatch(format, e.batch.session, e.batch.seq, e.batch.acked, txs)
	case entryOpen:
		return encodeOpen(format, e.nonce)
	case entryTermStart:
		return encodeTermStart(format)
	}
	b := binary.AppendUvarint([]byte{byte(format), byte(entryRaise)}, e.raise)
	if format >= historyFormat {
		b = binary.AppendUvarint(b, e.history)
	}
	return b
}

var goldenEntries = []struct {
	words string
	entry entry
}{
	{"open a session", entry{kind: entryOpen, nonce: [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}}},
	{"the first entry of a term", entry{kind: entryTermStart}},
	{"raise the format to 300", entry{kind: entryRaise, raise: 300}},
	{"set k to v", batchOf(3, 1, 0, transaction{{kind: opSet, key: "k", value: []byte("v")}})},
	{"set ключ to nothing", batchOf(3, 2, 1, transaction{{kind: opSet, key: "ключ"}})},
	{"delete k", batchOf(3, 3, 2, transaction{{kind: opDelete, key: "k"}})},
	{"insert k", batchOf(3, 4, 2, transaction{{kind: opIfNotExists, key: "k"}, {kind: opSet, key: "k", value: []byte{0, 0xff}}})},
	{"allow and disallow an address", batchOf(3, 5, 2, transaction{{kind: opAllow, key: "a:1"}}, transaction{{kind: opDisallow, key: "a:1"}})},
	{"every condition", batchOf(1<<40, 1<<33, 1<<32, transaction{{kind: opIfExists, key: "k"}, {kind: opIfNotExists, key: "m"},
		{kind: opIfValue, key: "k", value: []byte("v")}, {kind: opIfNotValue, key: "k", value: []byte("w")},
		{kind: opIfVersion, key: "k", version: 1 << 50}, {kind: opIfNotVersion, key: "k", version: 0}})},
	{"a transaction of nothing", batchOf(3, 6, 2, transaction{})},
}

func batchOf(session, seq, acked uint64, txs ...transaction) entry {
	return entry{kind: entryBatch, batch: batch{session: session, seq: seq, acked: acked, txs: txs}}
}

// inFormat is the entry as it is written while the state is at a format.
func (e entry) inFormat(format uint64) entry {
	e.format = format
	if e.kind == entryRaise && format >= historyFormat {
		e.history = 5000
	}
	return e
}

// What is in a log is read for years: these bytes must not change, whatever the code does.
func TestEntryBytesStay(t *testing.T) {
	for format := uint64(firstFormat); format <= entryFormat; format++ {
		path := filepath.Join("testdata", "format", fmt.Sprint("v", format), "entries.txt")
		if _, err := os.Stat(path); err != nil && *update {
			var b strings.Builder
			for _, g := range goldenEntries {
				fmt.Fprintf(&b, "# %s\n%x\n", g.words, encodeEntry(g.entry.inFormat(format)))
			}
			must(t, os.WriteFile(path, []byte(b.String()), 0o644))
		}
		text, err := os.ReadFile(path)
		must(t, err)
		lines := strings.Split(strings.TrimSpace(string(text)), "\n")
		if len(lines) != 2*len(goldenEntries) {
			t.Fatalf("%s has %d lines, want two for each of %d entries", path, len(lines), len(goldenEntries))
		}
		for i, g := range goldenEntries {
			t.Run(fmt.Sprintf("format %d, %s", format, g.words), func(t *testing.T) {
				if lines[2*i] != "# "+g.words {
					t.Fatalf("the file has %q here", lines[2*i])
				}
				data, err := hex.DecodeString(lines[2*i+1])
				must(t, err)
				got, err := decodeEntry(data)
				must(t, err)
				if want := g.entry.inFormat(format); !equalEntries(got, want) {
					t.Errorf("these bytes mean %+v, want %+v", got, want)
				}
				if again := encodeEntry(got); !bytes.Equal(again, data) {
					t.Errorf("encoded again:\n%x, want\n%x", again, data)
				}
			})
		}
	}
}

// equalEntries takes no notice of the sum, which the bytes carry and a literal does not, nor of nil against empty.
func equalEntries(a, b entry) bool {
	at, bt := a.batch.txs, b.batch.txs
	a.format, b.format = max(a.format, firstFormat), max(b.format, firstFormat)
	a.batch.txs, b.batch.txs, a.batch.sum, b.batch.sum = nil, nil, [8]byte{}, [8]byte{}
	if !reflect.DeepEqual(a, b) || len(at) != len(bt) {
		return false
	}
	for i := range at {
		if len(at[i]) != len(bt[i]) {
			return false
		}
		for j, x := range at[i] {
			y := bt[i][j]
			if x.kind != y.kind || x.key != y.key || !bytes.Equal(x.value, y.value) || x.version != y.version {
				return false
			}
		}
	}
	return true
}

// Any bytes mean the same on every member, so decoding takes whatever comes; and what it accepts, it accepts again.
func FuzzEntry(f *testing.F) {
	for _, g := range goldenEntries {
		f.Add(encodeEntry(g.entry))
		f.Add(encodeEntry(g.entry.inFormat(historyFormat)))
	}
	for _, data := range [][]byte{nil, {1}, {0, 3}, {1, 9}, {2, 3}, {1, 3, 0}, {1, 4, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1}} {
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := decodeEntry(data)
		if err != nil {
			if !errors.Is(err, errEntry) && !errors.Is(err, ErrFormat) {
				t.Errorf("error %v is not errEntry", err)
			}
			return
		}
		again, err := decodeEntry(encodeEntry(e))
		if err != nil || !equalEntries(e, again) {
			t.Errorf("%x means %+v, and encoded again %+v (%v)", data, e, again, err)
		}
	})
}

// FuzzTransactions reaches behind the checksum, which keeps FuzzEntry from most of a batch.
func FuzzTransactions(f *testing.F) {
	for _, g := range goldenEntries {
		for _, tx := range g.entry.batch.txs {
			f.Add(appendTransaction(nil, tx))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := decodeEntry(encodeBatch(firstFormat, 1, 1, 0, [][]byte{data}))
		if err != nil {
			return
		}
		for _, tx := range e.batch.txs {
			for _, o := range tx {
				if !validKey(o.key) || !o.kind.effect() && !o.kind.condition() {
					t.Errorf("%x means %+v, which apply does not expect", data, o)
				}
			}
		}
		again, err := decodeEntry(encodeEntry(e))
		if err != nil || !equalEntries(e, again) {
			t.Errorf("%x means %+v, and encoded again %+v (%v)", data, e, again, err)
		}
	})
}

func TestEntryDamaged(t *testing.T) {
	whole := encodeEntry(batchOf(3, 4, 2, transaction{{kind: opIfNotExists, key: "k"}, {kind: opSet, key: "k", value: []byte("value")}}))
	t.Run("cut anywhere", func(t *testing.T) {
		for n := range whole {
			if e, err := decodeEntry(whole[:n]); err == nil {
				t.Errorf("the first %d of %d bytes mean %+v", n, len(whole), e)
			}
		}
	})
	t.Run("a byte too many", func(t *testing.T) {
		if e, err := decodeEntry(append(bytes.Clone(whole), 0)); err == nil {
			t.Errorf("they mean %+v", e)
		}
	})
	t.Run("a bit flipped in the transactions", func(t *testing.T) {
		for i := 5; i < len(whole); i++ {
			bad := bytes.Clone(whole)
			bad[i] ^= 0x10
			if e, err := decodeEntry(bad); err == nil {
				t.Errorf("with byte %d flipped they mean %+v", i, e)
			}
		}
	})
	t.Run("a count that promises too much allocates nothing", func(t *testing.T) {
		for _, body := range []string{"\xff\xff\xff\xff\x0f", "\x80\x20", "\x7f"} {
			if e, err := decodeEntry(encodeBatch(firstFormat, 1, 1, 0, [][]byte{[]byte(body)})); err == nil {
				t.Errorf("count %x: they mean %+v", body, e)
			}
		}
	})
}

func TestEntryLimits(t *testing.T) {
	ok := func(txs ...transaction) error {
		_, err := decodeEntry(encodeEntry(batchOf(1, 1, 0, txs...)))
		return err
	}
	set := func(key string) op { return op{kind: opSet, key: key, value: []byte("v")} }
	long := strings.Repeat("k", maxKey)
	for _, c := range []struct {
		words string
		tx    transaction
		fine  bool
	}{
		{"the longest key", transaction{set(long)}, true},
		{"a key one byte longer", transaction{set(long + "k")}, false},
		{"no key", transaction{set("")}, false},
		{"a NUL in the key", transaction{set("a\x00b")}, false},
		{"a key that is not UTF-8", transaction{set("\xff")}, false},
		{"the largest value", transaction{{kind: opSet, key: "k", value: make([]byte, maxValueEver)}}, true},
		{"a value one byte larger", transaction{{kind: opSet, key: "k", value: make([]byte, maxValueEver+1)}}, false},
		{"an operation of kind 0", transaction{{key: "k"}}, false},
		{"an operation of kind 5", transaction{{kind: 5, key: "k"}}, false},
		{"an operation of kind 22", transaction{{kind: 22, key: "k"}}, false},
		{"as many operations as there may be", deletes(maxOps), true},
		{"one operation more", deletes(maxOps + 1), false},
	} {
		if err := ok(c.tx); (err == nil) != c.fine {
			t.Errorf("%s: %v", c.words, err)
		}
	}
}

func deletes(n int) (tx transaction) {
	for range n {
		tx = append(tx, op{kind: opDelete, key: "k"})
	}
	return tx
}

func TestOutcomeRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		want := outcome{
			kind:    outcomeKind(rapid.IntRange(int(outcomeDone), int(outcomeInvalid)).Draw(t, "kind")),
			index:   rapid.Uint64().Draw(t, "index"),
			session: rapid.Uint64().Draw(t, "session"),
			results: []result{},
		}
		for range rapid.IntRange(0, 5).Draw(t, "results") {
			r := result{revision: rapid.Uint64().Draw(t, "revision")}
			if rapid.Bool().Draw(t, "unsatisfied") {
				r.status, r.at, r.have = txUnsatisfied, rapid.Uint64().Draw(t, "at"), rapid.Uint64().Draw(t, "have")
			}
			want.results = append(want.results, r)
		}
		data := encodeOutcome(want)
		got, err := decodeOutcome(data)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%+v came back as %+v, %v", want, got, err)
		}
		for n := range data {
			if _, err := decodeOutcome(data[:n]); err == nil {
				t.Fatalf("the first %d bytes of %x are an outcome", n, data)
			}
		}
	})
}

func FuzzOutcome(f *testing.F) {
	f.Add(encodeOutcome(outcome{kind: outcomeDone, index: 1, results: []result{{}, {status: txUnsatisfied, at: 1, have: 2}}}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		o, err := decodeOutcome(data)
		if err != nil {
			return
		}
		if again, err := decodeOutcome(encodeOutcome(o)); err != nil || !reflect.DeepEqual(o, again) {
			t.Errorf("%x means %+v, and encoded again %+v (%v)", data, o, again, err)
		}
	})
}
