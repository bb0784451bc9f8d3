package quorate

// Reading: what a key holds and since when, from this member's own copy (View) or, after a read round, linearizably (Lookup).
// It owns Entry, View and Freshness. It asks read.go for the round and the store for the rows, and never touches the log.

// An Entry is a key with its value and the revisions that wrote it.
type Entry struct {
	Key     string
	Value   []byte // a copy, never nil if the key is there
	Version uint64 // revision of its last set; 0 = there is no such key
	Created uint64 // revision of the set that made it
}

// A View reads this member's own copy: no network, no waiting for others. It may be behind, without bound while this member is
// cut off; a write that returned on this same member is in it.
type View struct{ s *Service }

// Local returns the view of this member's copy. It works without a majority and after removal, until Close.
func (s *Service) Local() View { return View{s} }
