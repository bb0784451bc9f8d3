package quorate

// How a Status is written for programs: as JSON, in which a role is a word and every duration is a number of seconds. It owns
// these forms and nothing else: what a Status holds is found out in member.go. Control comes from encoding/json, in the handlers and
// the tools of those who use this package.

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"
)

// MarshalText is String as bytes: a Role is a word in JSON, also as a key of a map.
func (r Role) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

// UnmarshalText takes what MarshalText gives. Any other text is ErrInvalid.
func (r *Role) UnmarshalText(text []byte) error {
	i := slices.Index(roleNames[:], string(text))
	if i < 0 {
		return fmt.Errorf("quorate: %w: %q is no role", ErrInvalid, text)
	}
	*r = Role(i)
	return nil
}

// seconds is a duration whose JSON is a number of seconds.
type seconds time.Duration

func (d seconds) MarshalJSON() ([]byte, error) {
	return strconv.AppendFloat(nil, time.Duration(d).Seconds(), 'f', -1, 64), nil
}

func (d *seconds) UnmarshalJSON(data []byte) error {
	n := time.Duration(*d).Seconds() // null changes nothing
	if err := json.Unmarshal(data, &n); err != nil {
		return err
	}
	ns := math.Round(n * float64(time.Second))
	if ns >= math.MaxInt64 || ns <= math.MinInt64 {
		return fmt.Errorf("quorate: %w: a duration of %s s", ErrInvalid, data)
	}
	*d = seconds(ns)
	return nil
}

// The types below are the public ones without their methods. A field beside one hides that of the same name in it, so that whatever
// is added to Status or Member is in the JSON; a test finds a duration that is not in seconds.
type (
	plainStatus Status
	plainMember Member
)

// MarshalJSON writes the fields under their names in Go, roles as words, times in UTC as RFC 3339 has them, and durations as
// seconds.
func (st Status) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		plainStatus
		Fsync seconds
	}{plainStatus(st), seconds(st.Fsync)})
}

// UnmarshalJSON takes what MarshalJSON gives.
func (st *Status) UnmarshalJSON(data []byte) error {
	v := struct {
		*plainStatus
		Fsync seconds
	}{(*plainStatus)(st), seconds(st.Fsync)}
	err := json.Unmarshal(data, &v)
	st.Fsync = time.Duration(v.Fsync)
	return err
}

// MarshalJSON writes a Member as it is written in a Status.
func (m Member) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		plainMember
		Heard seconds
	}{plainMember(m), seconds(m.Heard)})
}

// UnmarshalJSON takes what MarshalJSON gives.
func (m *Member) UnmarshalJSON(data []byte) error {
	v := struct {
		*plainMember
		Heard seconds
	}{(*plainMember)(m), seconds(m.Heard)}
	err := json.Unmarshal(data, &v)
	m.Heard = time.Duration(v.Heard)
	return err
}
