package quorate

import (
	"bytes"
	"encoding/json"
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"
)

// fillFields gives every field below v another value that is not zero.
func fillFields(t *testing.T, v reflect.Value, n *int) {
	*n++
	switch v.Interface().(type) {
	case time.Duration:
		v.SetInt(int64(time.Duration(*n)*time.Minute + 1234567))
		return
	case time.Time:
		v.Set(reflect.ValueOf(time.Unix(int64(*n), 5).UTC()))
		return
	case Role:
		v.SetInt(int64(NonVoter))
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(strings.Repeat("x", *n))
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(int64(*n))
	case reflect.Uint64:
		v.SetUint(uint64(*n))
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 2, 2))
		for i := range v.Len() {
			fillFields(t, v.Index(i), n)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			fillFields(t, v.Field(i), n)
		}
	default:
		t.Fatalf("fillFields does not know %v", v.Type())
	}
}

// wantSeconds compares every duration below v with the JSON beside it.
func wantSeconds(t *testing.T, v reflect.Value, have any) {
	for i := range v.NumField() {
		name, field := v.Type().Field(i).Name, v.Field(i)
		got, ok := have.(map[string]any)[name]
		if !ok {
			t.Errorf("%v.%s is not in the JSON", v.Type(), name)
			continue
		}
		if d, ok := field.Interface().(time.Duration); ok && got != d.Seconds() {
			t.Errorf("%v.%s = %v is %v in the JSON, want seconds", v.Type(), name, d, got)
		}
		if list, ok := field.Interface().([]Member); ok {
			for j := range list {
				wantSeconds(t, reflect.ValueOf(list[j]), got.([]any)[j])
			}
		}
	}
}

// Whatever a Status holds comes back from its JSON, and nothing in it has to be known to be in nanoseconds.
func TestStatusJSON(t *testing.T) {
	t.Parallel()
	var st Status
	fillFields(t, reflect.ValueOf(&st).Elem(), new(int))
	for _, st := range []Status{st, {}} {
		data, err := json.Marshal(st)
		must(t, err)
		var back Status
		must(t, json.Unmarshal(data, &back))
		if !reflect.DeepEqual(back, st) {
			t.Errorf("%s\nis %+v\nwant %+v", data, back, st)
		}
	}
	data, err := json.Marshal(&st)
	must(t, err)
	var loose map[string]any
	must(t, json.Unmarshal(data, &loose))
	wantSeconds(t, reflect.ValueOf(st), loose)
	if loose["Role"] != "non-voter" {
		t.Errorf("the role is %v", loose["Role"])
	}
	list, err := json.Marshal(st.Members) // as a page that shows the members alone does
	must(t, err)
	if !bytes.Contains(data, list) {
		t.Errorf("the members alone are %s", list)
	}
	var members []Member
	must(t, json.Unmarshal(list, &members))
	if !reflect.DeepEqual(members, st.Members) {
		t.Errorf("they come back as %+v, want %+v", members, st.Members)
	}
}

func TestRoleText(t *testing.T) {
	t.Parallel()
	for r := Follower; r <= Closed; r++ {
		text, err := r.MarshalText()
		must(t, err)
		back := Role(-1)
		must(t, back.UnmarshalText(text))
		if back != r || string(text) != r.String() {
			t.Errorf("%d is %q and comes back as %d", int(r), text, int(back))
		}
	}
	data, err := json.Marshal(map[Role]Role{Leader: NonVoter})
	must(t, err)
	if string(data) != `{"leader":"non-voter"}` {
		t.Errorf("in JSON: %s", data)
	}
	for _, text := range []string{"", "Leader", "2", "Role(7)"} {
		if r := Candidate; !errors.Is(r.UnmarshalText([]byte(text)), ErrInvalid) || r != Candidate {
			t.Errorf("%q is taken for %v", text, r)
		}
	}
}

func TestSecondsJSON(t *testing.T) {
	t.Parallel()
	for _, d := range []time.Duration{0, 1, -time.Second, 12345678 * time.Microsecond, 24*time.Hour + 1} {
		data, err := json.Marshal(seconds(d))
		must(t, err)
		var back seconds
		must(t, json.Unmarshal(data, &back))
		if time.Duration(back) != d || bytes.ContainsAny(data, `"e`) {
			t.Errorf("%v is %s and comes back as %v", d, data, time.Duration(back))
		}
	}
	for _, text := range []string{"1e10", "-1e300", `"1s"`, "{}"} {
		if d := seconds(7); json.Unmarshal([]byte(text), &d) == nil || d != 7 {
			t.Errorf("%s is taken for %v", text, time.Duration(d))
		}
	}
	d := seconds(7)
	if must(t, json.Unmarshal([]byte("null"), &d)); d != 7 {
		t.Errorf("null makes it %v", time.Duration(d))
	}
}
