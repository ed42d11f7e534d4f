/* The floor: what `run true` of the benchmark's bundle costs with bare system calls and nothing else. The same
 * namespaces, mounts and cgroups, no checks, no configuration. Usage: floor ROOTFS CGROUP-DIR... */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(call) do { if ((long)(call) < 0) { perror(#call); exit(1); } } while (0)

static void child(const char *rootfs, int doors[], int count)
{
	for (int i = 0; i < count; i++)
		CHECK(write(doors[i], "0", 1));
	CHECK(mount(NULL, "/", NULL, MS_SLAVE | MS_REC, NULL));
	CHECK(mount(rootfs, rootfs, NULL, MS_BIND | MS_REC, NULL));
	CHECK(chdir(rootfs));
	CHECK(mount("proc", "proc", "proc", 0, NULL));
	CHECK(mount("tmpfs", "dev", "tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k"));
	CHECK(mkdir("dev/pts", 0755));
	CHECK(mkdir("dev/shm", 0755));
	CHECK(mkdir("dev/mqueue", 0755));
	CHECK(mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"));
	CHECK(mount("shm", "dev/shm", "tmpfs", MS_NOSUID | MS_NOEXEC | MS_NODEV, "mode=1777,size=65536k"));
	CHECK(mount("mqueue", "dev/mqueue", "mqueue", MS_NOSUID | MS_NOEXEC | MS_NODEV, NULL));
	CHECK(mount("sysfs", "sys", "sysfs", MS_NOSUID | MS_NOEXEC | MS_NODEV | MS_RDONLY, NULL));
	static const struct { const char *name; int major, minor; } nodes[] = {
		{"dev/null", 1, 3}, {"dev/zero", 1, 5}, {"dev/full", 1, 7},
		{"dev/tty", 5, 0}, {"dev/random", 1, 8}, {"dev/urandom", 1, 9},
	};
	for (unsigned i = 0; i < sizeof nodes / sizeof *nodes; i++)
		CHECK(mknod(nodes[i].name, S_IFCHR | 0666, (dev_t)(nodes[i].major << 8 | nodes[i].minor)));
	CHECK(syscall(SYS_pivot_root, ".", "."));
	CHECK(umount2(".", MNT_DETACH));
	CHECK(sethostname("box", 3));
	static const char *const covered[] = {"/proc/kcore", "/proc/keys", "/proc/timer_list"};
	for (unsigned i = 0; i < 3; i++)
		if (access(covered[i], F_OK) == 0)
			CHECK(mount("/dev/null", covered[i], NULL, MS_BIND, NULL));
	static const char *const readonly[] = {"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"};
	for (unsigned i = 0; i < 5; i++) {
		if (access(readonly[i], F_OK) < 0)
			continue;
		CHECK(mount(readonly[i], readonly[i], NULL, MS_BIND | MS_REC, NULL));
		CHECK(mount(NULL, readonly[i], NULL, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL));
	}
	CHECK(mount(NULL, "/", NULL, MS_BIND | MS_REMOUNT | MS_RDONLY, NULL));
	CHECK(chdir("/"));
	char *const argv[] = {"true", NULL}, *const envp[] = {"PATH=/bin", NULL};
	execve("/bin/true", argv, envp);
	perror("execve");
	exit(1);
}

int main(int argc, char **argv)
{
	int doors[32], count = 0, unified = -1;
	char path[4096];
	for (int i = 2; i < argc && count < 32; i++) {
		CHECK(mkdir(argv[i], 0755));
		static const char *const copied[] = {"cpuset.cpus", "cpuset.mems"};
		for (int f = 0; f < 2; f++) {
			snprintf(path, sizeof path, "%s/../%s", argv[i], copied[f]);
			int from = open(path, O_RDONLY);
			if (from < 0)
				continue;
			char value[256];
			ssize_t n = read(from, value, sizeof value);
			close(from);
			snprintf(path, sizeof path, "%s/%s", argv[i], copied[f]);
			int to = open(path, O_WRONLY);
			CHECK(write(to, value, (size_t)n));
			close(to);
		}
		snprintf(path, sizeof path, "%s/tasks", argv[i]);
		int door = open(path, O_WRONLY | O_CLOEXEC);
		if (door < 0)
			CHECK(unified = open(argv[i], O_PATH | O_DIRECTORY | O_CLOEXEC));
		else
			doors[count++] = door;
	}
	struct clone_args args = {
		.flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS,
		.exit_signal = SIGCHLD,
	};
	if (unified >= 0) {
		args.flags |= CLONE_INTO_CGROUP;
		args.cgroup = (__u64)unified;
	}
	long pid = syscall(SYS_clone3, &args, sizeof args);
	CHECK(pid);
	if (pid == 0)
		child(argv[1], doors, count);
	int status;
	CHECK(waitpid((pid_t)pid, &status, 0));
	for (int i = 2; i < argc; i++)
		while (rmdir(argv[i]) < 0)
			usleep(50);
	return WEXITSTATUS(status);
}
