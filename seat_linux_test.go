package quorate

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// What a file takes the place of snap by is durable step by step: its bytes before it has its second name, and each name before what
// that name replaces is gone. The calls of the kernel are read in a run of TestKilledWhilePlacing.
func TestPlacingIsDurable(t *testing.T) {
	t.Parallel()
	strace, err := exec.LookPath("strace")
	if err != nil {
		t.Skip("no strace")
	}
	dir := quickDir(t)
	out, data := filepath.Join(dir, "trace"), filepath.Join(dir, "data")
	cmd := exec.Command(strace, "-f", "-qq", "-y", "-o", out, "-e", "trace=pwrite64,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat", os.Args[0],
		"-test.run=^TestKilledWhilePlacing$")
	cmd.Env = append(os.Environ(), placeEnv+"=installed "+data)
	said, _ := cmd.CombinedOutput()
	if !strings.Contains(string(said), "killed at installed") {
		t.Skipf("strace does not work here: %s", said)
	}
	trace, err := os.ReadFile(out)
	must(t, err)
	steps := [][]string{
		{"sync(", "<" + data + "/snap.incoming>"},
		{"rename", data + `/snap.incoming"`, data + `/snap.mended"`},
		{"sync(", "<" + data + ">"},
		{"unlink", data + `/snap-wal"`},
		{"rename", data + `/snap.mended"`, data + `/snap"`},
		{"sync(", "<" + data + ">"},
	}
	done := 0
	for line := range strings.Lines(string(trace)) {
		if done == 1 && holdsAll(line, []string{"pwrite64(", "<" + data + "/snap.incoming>"}) {
			done = 0 // what was synced is not all
		}
		if done < len(steps) && holdsAll(line, steps[done]) {
			done++
			continue
		}
		for _, later := range steps[min(done, len(steps)):] {
			if later[0] != "sync(" && holdsAll(line, later) {
				t.Fatalf("before %q: %s", steps[done], line)
			}
		}
	}
	if done < len(steps) {
		t.Errorf("%q did not happen", steps[done])
	}
}

func holdsAll(line string, parts []string) bool {
	for _, part := range parts {
		if !strings.Contains(line, part) {
			return false
		}
	}
	return true
}
