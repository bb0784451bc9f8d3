package quorate

import (
	"testing"
	"time"
)

func TestPace(t *testing.T) {
	t.Parallel()
	var p pace
	for _, x := range []struct{ add, median time.Duration }{
		{9, 9}, {1, 9}, {2, 2}, {8, 8}, {3, 3}, // of 1 2 3 8 9
		{4, 3}, {5, 4}, {6, 5}, {7, 5}, // of 3 4 5 6 7
	} {
		if p.add(x.add); p.median() != x.median {
			t.Errorf("after %v: %v, want %v", x.add, p.median(), x.median)
		}
	}
	if (&pace{}).median() != 0 {
		t.Error("nothing has a pace")
	}
}
