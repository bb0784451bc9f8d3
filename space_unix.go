//go:build linux || darwin

package quorate

import "syscall"

// spaceOf asks the file system that dir lies on for what this process may use.
func spaceOf(dir string) diskSpace {
	var st syscall.Statfs_t
	if syscall.Statfs(dir, &st) != nil {
		return diskSpace{}
	}
	block := int64(st.Bsize)
	return diskSpace{free: int64(st.Bavail) * block, total: int64(st.Blocks) * block}
}
