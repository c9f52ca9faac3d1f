use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use nix::mount::{mount, MsFlags};
use nix::sys::resource::getrlimit;
use nix::unistd::{getgroups, gethostname, getresgid, getresuid, setuid};

use super::*;

const ENV: &str = "OVMS_TEST_JAIL";

fn config() -> JailConfig {
    JailConfig {
        uid: 64_123,
        gid: 64_124,
        root: 0,
        netns: 0,
        hostname: "h".repeat(70),
        max_file_size: 1 << 30,
        max_open_files: 64,
    }
}

/// A mount namespace whose root is covered by an empty directory: what a joiner gets.
fn empty_root() -> OwnedFd {
    let make = || {
        nix::sched::unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let opened = fs::File::open("/proc/thread-self/ns/mnt").unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("empty"), "/", Some("tmpfs"), MsFlags::MS_RDONLY, none).unwrap();
        opened
    };
    std::thread::spawn(make).join().unwrap().into()
}

/// Runs one of the tests below in a process of its own that was born as the engine gives birth to a VMM.
fn in_own_process(test: &str) -> std::process::Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([&format!("jail::tests::{test}"), "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    command.env(ENV, "1").stdin(Stdio::null());
    // SAFETY: the closure makes one system call.
    unsafe {
        command.pre_exec(|| {
            let flags = CloneFlags::CLONE_NEWUTS | CloneFlags::CLONE_NEWIPC;
            nix::sched::unshare(flags).map_err(io::Error::from)
        });
    }
    command.output().unwrap()
}

#[test]
#[ignore = "needs root"]
fn nothing_of_the_host_and_no_privilege_is_left_inside() {
    let output = in_own_process("inside");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
}

/// Not a test of its own: what `nothing_of_the_host_and_no_privilege_is_left_inside` looks at from inside.
#[test]
#[ignore = "needs root"]
fn inside() {
    if std::env::var_os(ENV).is_none() {
        return;
    }
    // The test has more than one thread, and a root belongs to a process unless a thread takes its own.
    nix::sched::unshare(CloneFlags::CLONE_FS).unwrap();
    enter(&config(), empty_root(), fs::File::open("/proc/self/ns/net").unwrap().into()).unwrap();

    assert_eq!(fs::read_dir("/").unwrap().count(), 0);
    assert_eq!(fs::read_dir("..").unwrap().count(), 0);
    assert!(fs::metadata("/proc").is_err());
    // Not even root could write there, but it is not root.
    assert!(fs::write("/file", "x").is_err());
    assert_eq!(gethostname().unwrap().to_str().unwrap(), "h".repeat(64));

    let (uid, gid) = (getresuid().unwrap(), getresgid().unwrap());
    assert!([uid.real, uid.effective, uid.saved].iter().all(|uid| uid.as_raw() == 64_123));
    assert!([gid.real, gid.effective, gid.saved].iter().all(|gid| gid.as_raw() == 64_124));
    assert!(getgroups().unwrap().is_empty());
    assert_eq!(setuid(Uid::from_raw(0)), Err(Errno::EPERM));
    assert_eq!(sethostname("other"), Err(Errno::EPERM));
    assert!(mount(Some("x"), "/", Some("tmpfs"), MsFlags::empty(), None::<&str>).is_err());
    assert!(sys::drop_bounding_set().is_err(), "dropping from the bounding set needs a capability");
    assert_eq!(prctl::get_no_new_privs(), Ok(true));
    assert_eq!(prctl::get_dumpable(), Ok(false));

    assert_eq!(getrlimit(Resource::RLIMIT_FSIZE), Ok((1 << 30, 1 << 30)));
    assert_eq!(getrlimit(Resource::RLIMIT_NOFILE), Ok((64, 64)));
    assert_eq!(getrlimit(Resource::RLIMIT_CORE), Ok((0, 0)));
}

#[test]
#[ignore = "needs root"]
fn enter_with_a_netns_that_is_none_returns_the_step() {
    let output = in_own_process("wrong_netns");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Not a test of its own, see above.
#[test]
#[ignore = "needs root"]
fn wrong_netns() {
    if std::env::var_os(ENV).is_none() {
        return;
    }
    let file = fs::File::open("/dev/null").unwrap();
    let err = enter(&config(), empty_root(), file.into()).unwrap_err();
    assert!(err.to_string().contains("joining the network namespace"), "{err}");
}

#[test]
#[ignore = "needs root"]
fn enter_with_a_root_that_is_none_returns_the_step() {
    let output = in_own_process("wrong_root");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Not a test of its own, see above.
#[test]
#[ignore = "needs root"]
fn wrong_root() {
    if std::env::var_os(ENV).is_none() {
        return;
    }
    let network = || fs::File::open("/proc/self/ns/net").unwrap().into();
    let err = enter(&config(), network(), network()).unwrap_err();
    assert!(err.to_string().contains("joining the empty root"), "{err}");
}
