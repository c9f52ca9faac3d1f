//! The VMM as a process: found, spawned, killed, reaped.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::ptr;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use nix::sys::signal::Signal;
use nix::sys::wait::{waitid, Id, WaitPidFlag, WaitStatus};
use ovms_config::paths::VMM_BINARY;
use ovms_config::{programs, Settings};

use crate::cgroup::Birthplace;
use crate::error::{Error, Kind, Result};
use crate::record::ProcessId;
use crate::sys::{self, SpawnError};

/// Finds the VMM: where the settings say, else beside the running program, else in `PATH`.
pub(crate) fn find_vmm(settings: &Settings) -> Result<PathBuf> {
    let configured = &settings.paths.vmm;
    if !configured.as_os_str().is_empty() {
        return if programs::is_program(configured) {
            Ok(configured.clone())
        } else {
            Err(no_vmm(&configured.display().to_string()))
        };
    }
    programs::find(VMM_BINARY).ok_or_else(|| no_vmm("beside this program or in PATH"))
}

fn no_vmm(place: &str) -> Error {
    Error::new(
        Kind::Unavailable,
        format!("there is no program {VMM_BINARY} {place}: install it, or name it in ovms.toml as paths.vmm"),
    )
}

/// Where a VMM is born.
pub struct Cradle<'a> {
    /// The program.
    pub program: &'a Path,
    /// Shown by `ps`.
    pub id: &'a str,
    /// The VMM's end of the control socket.
    pub control: OwnedFd,
    /// Its stderr.
    pub log: OwnedFd,
    /// Its cgroup.
    pub birthplace: &'a Birthplace,
}

/// A VMM process that has not been reaped.
#[derive(Debug)]
pub struct Process {
    id: ProcessId,
    pidfd: OwnedFd,
}

impl Process {
    /// Spawns a VMM and waits until its program is executed. It closes its stray descriptors, leads a session of its own,
    /// and has an empty environment.
    pub fn spawn(cradle: Cradle<'_>) -> Result<Self> {
        let error = || Error::io("the VMM cannot be spawned");
        let program = c_string(cradle.program.as_os_str().as_bytes())?;
        let words = [c_string(VMM_BINARY.as_bytes())?, c_string(b"--id")?, c_string(cradle.id.as_bytes())?];
        let argv: Vec<_> = words.iter().map(|arg| arg.as_ptr()).chain([ptr::null()]).collect();
        let null = File::options().read(true).write(true).open("/dev/null").map_err(error())?;
        let (null, log) = (high(&null).map_err(error())?, high(&cradle.log).map_err(error())?);
        let control = high(&cradle.control).map_err(error())?;
        let birth = sys::Birth {
            program: &program,
            argv: &argv,
            envp: &[ptr::null()],
            null: null.as_fd(),
            log: log.as_fd(),
            control: control.as_fd(),
            cgroup: cradle.birthplace.dir.as_ref().map(AsFd::as_fd),
            tasks: &cradle.birthplace.tasks,
        };
        let (pid, pidfd) = sys::spawn(&birth).map_err(|err| match err {
            SpawnError::Clone(err) if err.kind() == io::ErrorKind::PermissionDenied => {
                Error::new(Kind::FailedPrecondition, "a machine's namespaces need root: run as root").because(err)
            }
            SpawnError::Clone(err) => error()(err),
            SpawnError::Cgroup(err) => Error::io("the VMM cannot join its cgroup")(err),
            SpawnError::Exec(err) => {
                let message = format!("the VMM {} cannot be executed", cradle.program.display());
                Error::new(Kind::Unavailable, message).because(err)
            }
        })?;
        let mut process = Self { id: ProcessId { pid, start_time: 0 }, pidfd };
        process.id.start_time = start_time(pid).map_err(error()).inspect_err(|_| {
            // Nobody else knows of it.
            if process.kill().is_ok() {
                process.reap();
            }
        })?;
        Ok(process)
    }

    /// Takes over a child that a test has made.
    #[cfg(test)]
    pub(crate) fn adopt(pid: u32) -> io::Result<Self> {
        Ok(Self { id: ProcessId { pid, start_time: start_time(pid)? }, pidfd: sys::pidfd_open(pid)? })
    }

    pub(crate) fn id(&self) -> ProcessId {
        self.id
    }

    pub(crate) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Sends SIGKILL; no error if it is gone.
    pub fn kill(&self) -> io::Result<()> {
        kill(self.pidfd())
    }

    /// Waits for the end and takes its status; `None` if somebody else has taken it.
    pub fn reap(&self) -> Option<WaitStatus> {
        loop {
            match waitid(Id::PIDFd(self.pidfd()), WaitPidFlag::WEXITED) {
                Ok(status) => return Some(status),
                Err(Errno::EINTR) => (),
                Err(errno) => {
                    tracing::warn!(pid = self.id.pid, %errno, "the VMM's exit status was taken by somebody else");
                    return None;
                }
            }
        }
    }
}

/// Ends a process that is known by its record alone, if it still is that process, and waits for its end. It need not
/// be a child of the caller.
pub(crate) fn kill_recorded(id: ProcessId, patience: Duration) -> io::Result<()> {
    let pidfd = match sys::pidfd_open(id.pid) {
        Ok(pidfd) => pidfd,
        Err(err) if err.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
        Err(err) => return Err(err),
    };
    // The descriptor is opened first: if the number was given to another process before that, its start time tells; if
    // it is given away afterwards, the descriptor goes on meaning the old process.
    if start_time(id.pid).ok() != Some(id.start_time) {
        return Ok(());
    }
    kill(pidfd.as_fd())?;
    let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
    match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout)? {
        0 => Err(io::Error::new(io::ErrorKind::TimedOut, format!("process {} does not die", id.pid))),
        _ => Ok(()),
    }
}

/// Whether the recorded process still is there; one that has ended and only waits to be reaped is not.
pub(crate) fn is_alive(id: ProcessId) -> bool {
    let Ok(fields) = stat(id.pid) else { return false };
    let ended = matches!(fields.split_ascii_whitespace().next(), Some("Z" | "X"));
    !ended && field_22(&fields) == Some(id.start_time)
}

fn kill(pidfd: BorrowedFd<'_>) -> io::Result<()> {
    match sys::pidfd_send_signal(pidfd, Signal::SIGKILL as i32) {
        Err(err) if err.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other,
    }
}

fn start_time(pid: u32) -> io::Result<u64> {
    let time = field_22(&stat(pid)?);
    time.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat has no field 22")))
}

/// /proc/PID/stat (proc_pid_stat(5)) from its third field on. The second is the program's name in parentheses, which may
/// hold anything, so counting starts behind the last parenthesis.
fn stat(pid: u32) -> io::Result<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    Ok(stat.rsplit_once(')').map_or_else(String::new, |(_, rest)| rest.to_owned()))
}

/// The start time, of what [`stat`] gives.
fn field_22(fields: &str) -> Option<u64> {
    fields.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

fn c_string(bytes: &[u8]) -> Result<CString> {
    CString::new(bytes).map_err(|err| Error::new(Kind::InvalidArgument, "a name holds a zero byte").because(err))
}

/// A copy of a descriptor that is out of the way of those that the child puts in place.
fn high(fd: &impl AsFd) -> io::Result<OwnedFd> {
    sys::duplicate_above(fd.as_fd(), sys::FIRST_FREE_FD)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_start_time_of_a_process_does_not_change() {
        let pid = std::process::id();
        let time = start_time(pid).unwrap();
        assert!(time > 0);
        assert!(is_alive(ProcessId { pid, start_time: time }));
        assert!(!is_alive(ProcessId { pid, start_time: time + 1 }));
    }

    #[test]
    fn kill_recorded_spares_a_later_process_with_the_same_number() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId { pid: child.id(), start_time: start_time(child.id()).unwrap() };
        let wrong = ProcessId { start_time: id.start_time + 1, ..id };
        kill_recorded(wrong, Duration::from_secs(5)).unwrap();
        assert!(child.try_wait().unwrap().is_none());
        kill_recorded(id, Duration::from_secs(5)).unwrap();
        assert!(!child.wait().unwrap().success());
        kill_recorded(id, Duration::from_secs(5)).unwrap();
    }

    #[test]
    fn find_vmm_missing_returns_what_to_do() {
        let mut settings = Settings::default();
        settings.paths.vmm = "/no/such/vmm".into();
        let err = find_vmm(&settings).unwrap_err();
        assert_eq!(err.kind(), Kind::Unavailable);
        assert!(err.to_string().contains("/no/such/vmm"), "{err}");
        assert!(err.to_string().contains("paths.vmm"), "{err}");
    }

    #[test]
    #[ignore = "needs root"]
    fn spawn_into_a_cgroup_that_takes_nobody_returns_why_and_leaves_no_child() {
        let full = || File::options().write(true).open("/dev/full").unwrap();
        let spawned = Process::spawn(Cradle {
            program: Path::new("/bin/true"),
            id: "vm1",
            control: full().into(),
            log: full().into(),
            birthplace: &Birthplace { dir: None, tasks: vec![full().into()] },
        });
        let err = spawned.err().unwrap();
        assert!(err.chain().contains("cannot join its cgroup: No space left on device"), "{}", err.chain());
        let children = fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
        assert_eq!(children.trim(), "");
    }

    /// A host may mount version 2 beside version 1 (without controllers): enough to be born in one of its cgroups.
    #[test]
    #[ignore = "needs root and a cgroup2 mount"]
    fn on_cgroup_v2_a_vmm_is_born_in_its_cgroup() {
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mountinfo.lines().find(|line| line.contains(" - cgroup2 ")).expect("a cgroup2 mount");
        let cgroup = Path::new(line.split(' ').nth(4).unwrap()).join(format!("ovms-test-{}", std::process::id()));
        fs::create_dir(&cgroup).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("vmm");
        fs::write(&program, "#!/bin/sh\nexec sleep 60\n").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let open = File::open(&cgroup).unwrap();
        let null = || File::options().write(true).open("/dev/null").unwrap().into();

        let process = Process::spawn(Cradle {
            program: &program,
            id: "vm1",
            control: null(),
            log: null(),
            birthplace: &Birthplace { dir: Some(open.into()), tasks: Vec::new() },
        })
        .unwrap();
        let inside = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
        process.kill().unwrap();
        let status = process.reap();
        fs::remove_dir(&cgroup).unwrap();

        assert_eq!(inside.trim(), process.id().pid.to_string());
        assert!(matches!(status, Some(WaitStatus::Signaled(_, Signal::SIGKILL, _))), "{status:?}");
    }
}
