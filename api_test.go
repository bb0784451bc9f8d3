package quorate

import (
	"os"
	"os/exec"
	"testing"
)

// The public API is what `go doc -all` prints. Whoever changes a name, a signature or a docstring sees the difference here, and
// means it: -update writes the new text.
func TestPublicAPI(t *testing.T) {
	t.Parallel()
	const golden = "testdata/api.txt"
	got, err := exec.Command("go", "doc", "-all", ".").Output()
	must(t, err)
	if *update {
		must(t, os.WriteFile(golden, got, 0o644))
	}
	want, err := os.ReadFile(golden)
	must(t, err)
	if string(got) != string(want) {
		t.Errorf("the public API is not the one in %s. Rewrite it with -update and read the difference, or mend the code.\n%s",
			golden, firstDifference(string(want), string(got)))
	}
}
