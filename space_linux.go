package quorate

import (
	"os"
	"syscall"
)

// allocate takes space for a file.
func allocate(f *os.File, size int64) error {
	return os.NewSyscallError("fallocate", syscall.Fallocate(int(f.Fd()), 0, 0, size))
}
