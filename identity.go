package quorate

// Who this member is: the id file, the lock on its directory, its address in canonical form and the certificate that must
// be valid for it. It never touches the log, SQLite or the network. Open comes here first: lock, then identity; nothing
// else is opened before both stand. peer.go brings every address through canonicalAddr, so that equal addresses are equal strings.

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/gofrs/flock"
)

// An intent says how a member came to be. It is on disk before the first contact, so that a joiner that is killed half-way
// joins again and never bootstraps a second cluster.
type intent string

const (
	intentBootstrap intent = "bootstrap"
	intentJoin      intent = "join"
	intentMember    intent = "member" // it has state, and has made promises with it
)

// Formats of the id file. One without founders is written in the first, so that any release reads it; a release that knows no
// founders must not open a directory in which nothing may be acknowledged yet.
const (
	identityFirst  = 1
	identityFormat = 2 // with founders, and the newest that this code reads
)

type identity struct {
	id      string // 32 lower-case hex digits; never reused: a wiped directory gets a new one
	cluster string // likewise; "" until a joiner was admitted
	intent  intent

	// Nothing is acknowledged before a majority of these addresses, with commas between, vote. "" = that was so once, or was never
	// asked for.
	founders string
}

func (id identity) foundersList() []string {
	if id.founders == "" {
		return nil
	}
	return strings.Split(id.founders, ",")
}

// newID returns 128 random bits as 32 hex digits.
func newID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails: the process ends if the system has no randomness
	return hex.EncodeToString(b[:])
}

func validID(s string) bool {
	return len(s) == 32 && strings.Trim(s, "0123456789abcdef") == ""
}

func (id identity) valid() bool {
	if list, err := checkFounders(id.foundersList()); err != nil || strings.Join(list, ",") != id.founders {
		return false
	}
	return validID(id.id) && (id.cluster == "" || validID(id.cluster)) && (id.intent == intentBootstrap || id.intent == intentJoin || id.intent == intentMember)
}

// encodeIdentity gives the id file, for people too:
//
//	quorate member 1
//	id 5f0c…
//	cluster 91ab…           or - while it is not known
//	intent bootstrap        or join, and member once there is state
//	founders a:1,b:1,c:1    only until a majority of them vote, and in format 2: see founding.go
//	sum 1c9e0f66a2b7d310    the first 16 digits of: head -n -1 id | sha256sum
//
// The first line and the last keep this form in every format: a flipped bit in the format's number is damage, not news.
func encodeIdentity(id identity) []byte {
	cluster := id.cluster
	if cluster == "" {
		cluster = "-"
	}
	format, founders := identityFirst, ""
	if id.founders != "" {
		format, founders = identityFormat, "founders "+id.founders+"\n"
	}
	body := fmt.Sprintf("quorate member %d\nid %s\ncluster %s\nintent %s\n%s", format, id.id, cluster, id.intent, founders)
	return []byte(body + "sum " + identitySum(body) + "\n")
}

func identitySum(body string) string {
	sum := sha256.Sum256([]byte(body))
	return hex.EncodeToString(sum[:8])
}

// decodeIdentity accepts exactly what encodeIdentity writes; the comparison at its end makes up for a lenient Sscanf.
func decodeIdentity(data []byte) (identity, error) {
	text := string(data)
	at := strings.LastIndex(text, "sum ")
	if at < 0 || text[at:] != "sum "+identitySum(text[:at])+"\n" {
		return identity{}, fmt.Errorf("%w: the checksum does not match", ErrCorrupt)
	}
	var format uint64
	if _, err := fmt.Sscanf(text, "quorate member %d\n", &format); err != nil {
		return identity{}, fmt.Errorf("%w: not an id file of quorate", ErrCorrupt)
	}
	if format > identityFormat {
		return identity{}, fmt.Errorf("%w: id file of format %d, and this build reads up to %d", ErrFormat, format, identityFormat)
	}
	var id identity
	_, err := fmt.Sscanf(text[:at], "quorate member %d\nid %s\ncluster %s\nintent %s\n", &format, &id.id, &id.cluster, &id.intent)
	if _, list, ok := strings.Cut(text[:at], "\nfounders "); ok {
		id.founders = strings.TrimSuffix(list, "\n")
	}
	if id.cluster == "-" {
		id.cluster = ""
	}
	if err != nil || !id.valid() || string(encodeIdentity(id)) != text {
		return identity{}, fmt.Errorf("%w: not the lines of an id file", ErrCorrupt)
	}
	return id, nil
}

// readIdentity returns false if dir holds no id file. A damaged one is an error and never a reason for a fresh identity:
// the member may have voted under the old one.
func readIdentity(dir string) (identity, bool, error) {
	path := filepath.Join(dir, "id")
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return identity{}, false, nil
	}
	if err != nil {
		return identity{}, false, fmt.Errorf("member id: %w", err)
	}
	id, err := decodeIdentity(data)
	if errors.Is(err, ErrCorrupt) {
		return identity{}, false, fmt.Errorf("%s: %w; put back a copy of this file, or remove this member from the cluster, "+
			"empty its directory and let it join anew", path, err)
	}
	if err != nil {
		return identity{}, false, fmt.Errorf("%s: %w", path, err)
	}
	return id, true, nil
}

// writeIdentity replaces the id file: afterwards, and after a crash at any step, it holds the old identity or the new one.
// The directory must be locked. After an error of the last step either may be there; the caller stops in any case.
func writeIdentity(dir string, id identity) error {
	if !id.valid() {
		return fmt.Errorf("write member id: %w: id %q, cluster %q, intent %q", ErrInvalid, id.id, id.cluster, id.intent)
	}
	return replaceIdentity(dir, encodeIdentity(id))
}

func replaceIdentity(dir string, data []byte) error {
	if err := replaceFile(filepath.Join(dir, "id"), idTemp(dir), data); err != nil {
		return fmt.Errorf("write member id: %w", err)
	}
	return nil
}

// replaceFile gives a file this content, by a rename of temp, which lies beside it. After an error either content may be there, whole.
func replaceFile(path, temp string, data []byte) error {
	if err := writeTemp(temp, data); err != nil {
		return err
	}
	if err := os.Rename(temp, path); err != nil {
		_ = os.Remove(temp)
		return err
	}
	return syncDir(filepath.Dir(path))
}

// idTemp lies beside the id file, not in wal, which may be a disk of its own: a rename does not cross disks.
func idTemp(dir string) string { return filepath.Join(dir, "id.tmp") }

// writeTemp makes a new file with this content and syncs it, or leaves none. It removes what a crash left of an earlier try.
func writeTemp(path string, data []byte) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err != nil {
		_ = os.Remove(path)
	}
	return err
}

// syncDir makes names in dir durable: a rename alone could be undone by a power cut. Windows has no such call.
func syncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// SQLite takes no path over 512 bytes, with what it puts behind a name. The longest name that it is given in a member's directory is
// that of a new file while it is made.
const (
	maxSQLitePath = 512 - len("-journal")
	maxDir        = maxSQLitePath - len("/snap.incoming.new")
)

// memberDir is where a directory is, whatever becomes of the program's working directory, and of a link on the way, while a member is in
// it: both would lead the next file of the log elsewhere.
func memberDir(dir string) (string, error) {
	if dir == "" {
		return "", fmt.Errorf("%w: Dir is empty: give the data directory a name", ErrInvalid)
	}
	dir, err := realPath(dir)
	if err != nil {
		return "", fmt.Errorf("%w: data directory: %w", ErrInvalid, err)
	}
	if len(dir) > maxDir {
		return "", fmt.Errorf("%w: the data directory's path has %d bytes, and SQLite takes %d: give a shorter one: %s", ErrInvalid, len(dir), maxDir, dir)
	}
	return dir, nil
}

// realPath is path, absolute and without links as far as it exists.
func realPath(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	for there, rest := abs, ""; ; {
		real, err := filepath.EvalSymlinks(there)
		if err == nil {
			return filepath.Join(real, rest), nil
		}
		parent := filepath.Dir(there)
		if !errors.Is(err, fs.ErrNotExist) || parent == there {
			return abs, nil // whoever opens it is told what is wrong
		}
		there, rest = parent, filepath.Join(filepath.Base(there), rest)
	}
}

// A dirLock keeps every other Service, of this process or another, out of a directory. The system drops it with the process.
type dirLock struct {
	flock  *flock.Flock
	holder string   // path of the file that tells others who holds the lock
	made   []string // directories that were missing, outermost first
	fresh  bool     // so was the lock's file

	once sync.Once // guards err: a second unlock must not touch what a new holder has
	err  error
}

// lockDir makes dir and dir/wal where they are missing and locks them for this member, or returns ErrLocked at once, naming
// the holder. It finds out here that dir is no directory or cannot be written; then nothing that it made is left.
func lockDir(dir, addr string) (*dirLock, error) {
	if dir == "" {
		return nil, fmt.Errorf("%w: the data directory has no name", ErrInvalid)
	}
	if err := checkLinks(dir); err != nil {
		return nil, err
	}
	wal := filepath.Join(dir, "wal")
	made, err := makeDirs(wal)
	if err != nil {
		return nil, fmt.Errorf("data directory: %w", err)
	}
	// Read and write: NFS locks exclusively only a file that is open for writing.
	l := &dirLock{
		flock:  flock.New(filepath.Join(wal, "lock"), flock.SetFlag(os.O_CREATE|os.O_RDWR)),
		holder: filepath.Join(wal, "holder"),
		made:   made,
	}
	_, err = os.Lstat(l.flock.Path())
	l.fresh = errors.Is(err, fs.ErrNotExist)
	free, err := l.tryLock()
	if err != nil {
		removeDirs(made)
		return nil, fmt.Errorf("lock data directory: %w", err)
	}
	if !free {
		return nil, fmt.Errorf("%w: %s is held by %s", ErrLocked, dir, readHolder(l.holder))
	}
	if err = l.settle(dir, addr); err == nil {
		err = syncName(dir)
	}
	if err != nil {
		l.takeBack()
		return nil, fmt.Errorf("data directory: %w", err)
	}
	return l, nil
}

// checkLinks refuses a directory of which a name is a link to nothing, or on the way to which there is one. That is a member whose disk
// is not there, and not one that has no state yet: a new one made beside it would answer in its place.
func checkLinks(dir string) error {
	for _, name := range []string{"wal", "id", "snap", filepath.Join("wal", "wal-meta.db")} {
		link := deadLink(filepath.Join(dir, name))
		if link == "" {
			continue
		}
		to, err := os.Readlink(link)
		if err != nil {
			return err
		}
		return fmt.Errorf("%w: %s is a symbolic link to %s, and nothing is there: mount the disk that it leads to, or correct the link; only if "+
			"what it led to is lost for good, move the directory away and start empty with a bootURL (or with Restore)", ErrCorrupt, link, to)
	}
	return nil
}

// deadLink is path, or what is above it, if that is a link to nothing; else empty.
func deadLink(path string) string {
	for ; ; path = filepath.Dir(path) {
		info, err := os.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) && path != filepath.Dir(path) {
			continue
		}
		if err != nil || info.Mode()&fs.ModeSymlink == 0 {
			return ""
		}
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			return ""
		}
		return path
	}
}

// tryLock locks the file that has the name now: one that takeBack has removed since it was opened keeps nobody out. A file system whose
// files have no lasting numbers looks like that for ever, so the last try counts.
func (l *dirLock) tryLock() (bool, error) {
	for try := 1; ; try++ {
		free, err := l.flock.TryLock()
		if !free || err != nil || try == 10 {
			return free, err
		}
		locked, err := l.flock.Stat()
		named, missing := os.Stat(l.flock.Path())
		if err == nil && missing == nil && os.SameFile(locked, named) {
			return true, nil
		}
		if err := l.flock.Unlock(); err != nil {
			return false, err
		}
	}
}

// syncName makes the name of a directory durable that is not a member's yet: the operator has made it, or a start that was killed, and
// nobody has synced its parent. Where the parent can't be read, or can't be synced (another file system may begin here), the name is
// not of our making, and stays as durable as it is.
func syncName(dir string) error {
	if _, err := os.Lstat(filepath.Join(dir, "id")); err == nil {
		return nil
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	err = syncDir(filepath.Dir(dir))
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	return err
}

// settle writes to both directories: it leaves the holder's name, removes what a killed writeIdentity left, and finds out
// that a directory cannot be written while nothing depends on it yet.
func (l *dirLock) settle(dir, addr string) error {
	if err := writeTemp(idTemp(dir), nil); err != nil {
		return err
	}
	if err := os.Remove(idTemp(dir)); err != nil {
		return err
	}
	return os.WriteFile(l.holder, fmt.Appendf(nil, "%d %s\n", os.Getpid(), addr), 0o600)
}

// unlock may be called again. The lock file stays, as a member's directory does.
func (l *dirLock) unlock() error {
	l.once.Do(func() {
		_ = os.Remove(l.holder) // only a message, and Windows refuses while someone reads it
		if err := l.flock.Unlock(); err != nil {
			l.err = fmt.Errorf("unlock data directory: %w", err)
		}
	})
	return l.err
}

// takeBack leaves the directory without what lockDir has made there, and unlocks it.
func (l *dirLock) takeBack() {
	_ = os.Remove(l.holder)
	if l.fresh { // before it is free: tryLock sees it
		_ = os.Remove(l.flock.Path())
	}
	_ = l.unlock()
	removeDirs(l.made)
}

func (l *dirLock) owns(path string) bool { return path == l.holder || path == l.flock.Path() }

// readHolder says who holds the lock, for a person. The file is apart from the lock, which Windows would not let us read.
// Just after the lock changed hands it can be missing, or name a holder that was killed.
func readHolder(path string) string {
	var pid int
	var addr string
	data, _ := os.ReadFile(path)
	if n, _ := fmt.Sscan(string(data), &pid, &addr); n == 0 {
		return "another member"
	}
	who := fmt.Sprintf("process %d", pid)
	if pid == os.Getpid() {
		who = fmt.Sprintf("this process (%d)", pid)
	}
	if addr != "" {
		who += ", member " + addr
	}
	return who
}

// makeDirs makes path and its missing parents, durably, and returns those that it made, outermost first; after an error none.
func makeDirs(path string) (made []string, err error) {
	fi, err := os.Stat(path)
	if err == nil && !fi.IsDir() {
		return nil, fmt.Errorf("%w: %s is a file, not a directory", ErrInvalid, path)
	}
	if err == nil {
		return nil, nil
	}
	parent := filepath.Dir(path)
	if parent != path { // first, so that the error names the file that is in the way
		var parentErr error
		if made, parentErr = makeDirs(parent); parentErr != nil {
			return nil, parentErr
		}
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	err = os.Mkdir(path, 0o700)
	if errors.Is(err, fs.ErrExist) { // someone else was faster, or it is a link to nowhere
		if _, err = os.Stat(path); err == nil {
			return made, nil
		}
	}
	if err == nil {
		made = append(made, path)
		err = syncDir(parent)
	}
	if err != nil {
		removeDirs(made)
		return nil, err
	}
	return made, nil
}

// removeDirs takes back what makeDirs made, as far as it is still empty.
func removeDirs(made []string) {
	for i := len(made) - 1; i >= 0; i-- {
		_ = os.Remove(made[i])
	}
}

// canonicalAddr returns the one form of host:port in which addresses are compared, stored and dialled: host in lower case
// without a trailing dot, an IP address as netip prints it (IPv6 in brackets, an embedded IPv4 as IPv4), the port in decimal.
// What no peer could dial is ErrInvalid.
func canonicalAddr(addr string) (string, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		if strings.Contains(addr, "://") {
			return "", fmt.Errorf("%w: address %q: give host and port without a scheme, as in db1.example:7000", ErrInvalid, addr)
		}
		if strings.Count(addr, ":") > 1 && !strings.HasPrefix(addr, "[") {
			return "", fmt.Errorf("%w: address %q: an IPv6 address stands in brackets, as in [2001:db8::1]:7000", ErrInvalid, addr)
		}
		return "", fmt.Errorf("%w: address %q: give host and port, as in db1.example:7000", ErrInvalid, addr)
	}
	if host, err = canonicalHost(host); err != nil {
		return "", fmt.Errorf("%w: address %q: %w", ErrInvalid, addr, err)
	}
	if port, err = canonicalPort(port); err != nil {
		return "", fmt.Errorf("%w: address %q: %w", ErrInvalid, addr, err)
	}
	return net.JoinHostPort(host, port), nil
}

// canonicalPort takes numbers only: a service's name means what the machine at hand says that it means.
func canonicalPort(port string) (string, error) {
	n, err := strconv.ParseUint(port, 10, 16)
	switch {
	case err != nil:
		return "", fmt.Errorf("the port must be a number from 1 to 65535, not %q", port)
	case n == 0:
		return "", errors.New("a peer cannot reach port 0: listen first, then give the port that was chosen")
	}
	return strconv.FormatUint(n, 10), nil
}

// canonicalHost returns host without brackets.
func canonicalHost(host string) (string, error) {
	if host == "" {
		return "", errors.New("no host: give the name or the IP address at which peers reach this member")
	}
	if ip, err := netip.ParseAddr(host); err == nil {
		return canonicalIP(ip.Unmap())
	}
	name := strings.ToLower(strings.TrimSuffix(host, "."))
	if !validHostname(name) {
		return "", fmt.Errorf("%q is neither an IP address nor a host name (letters, digits, - and _ between dots)", host)
	}
	return name, nil
}

func canonicalIP(ip netip.Addr) (string, error) {
	switch {
	case ip.WithZone("").IsUnspecified():
		return "", fmt.Errorf("a peer cannot reach %s: give the address at which other members reach this one; "+
			"the listener itself may well listen on %[1]s", ip)
	case ip.Zone() != "":
		return "", fmt.Errorf("the zone of %s means something on one machine only: give a name or an address without one", ip)
	case ip.IsMulticast() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return "", fmt.Errorf("%s is not the address of one member", ip)
	}
	return ip.String(), nil
}

// validHostname wants lower case. A last label that starts with a digit and is a number is refused: resolvers read 127.1,
// 010.0.0.1 and 0x7f.1 as IPv4 addresses, each in its own way, and one of those is the wildcard.
func validHostname(name string) bool {
	if len(name) > 253 {
		return false
	}
	labels := strings.Split(name, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	last := labels[len(labels)-1]
	decimal := strings.Trim(last, "0123456789") == ""
	hexadecimal := strings.HasPrefix(last, "0x") && strings.Trim(last[2:], "0123456789abcdef") == ""
	return !decimal && !hexadecimal
}

// baseURL is where a peer's /raft/ begins, less the path. addr is canonical.
func baseURL(addr string, useTLS bool) string {
	if useTLS {
		return "https://" + addr
	}
	return "http://" + addr
}

// bootAddr turns a bootURL into a base URL, scheme://host or scheme://host:port. A scheme that is given stays: a balancer in
// front of the cluster may end TLS, or begin it. Without one, host and port are needed, and useTLS decides.
func bootAddr(bootURL string, useTLS bool) (string, error) {
	bad := func(why any) (string, error) {
		return "", fmt.Errorf("%w: boot URL %q: %v; give a member's host:port, or the http or https URL of a balancer", ErrInvalid, bootURL, why)
	}
	text, plain := bootURL, !strings.Contains(bootURL, "://")
	if plain {
		text = baseURL(bootURL, useTLS)
	}
	u, err := url.Parse(text)
	switch {
	case err != nil:
		var inner *url.Error // whose text repeats the URL, and a password with it
		if errors.As(err, &inner) {
			err = inner.Err
		}
		return "", fmt.Errorf("%w: boot URL: %v; give a member's host:port, or the http or https URL of a balancer", ErrInvalid, err)
	case u.User != nil:
		return "", fmt.Errorf("%w: boot URL of host %q: a name or password has no place in it; the client can carry them", ErrInvalid, u.Host)
	case u.Scheme != "http" && u.Scheme != "https":
		return bad("the scheme must be http or https")
	case u.RawQuery != "" || u.ForceQuery || u.Fragment != "":
		return bad("it must not have a query or a fragment")
	case strings.Trim(u.Path, "/") != "" && strings.Trim(u.Path, "/") != "raft":
		return bad("members answer at /raft/ and under no other path")
	case plain && u.Port() == "":
		return bad("no port")
	}
	host, err := canonicalHost(u.Hostname())
	if err != nil {
		return bad(err)
	}
	if strings.Contains(host, ":") {
		host = "[" + host + "]"
	}
	if u.Port() == "" {
		return u.Scheme + "://" + host, nil
	}
	port, err := canonicalPort(u.Port())
	if err != nil {
		return bad(err)
	}
	return u.Scheme + "://" + host + ":" + port, nil
}
