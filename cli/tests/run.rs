//! `ovm run` with bare-metal guests, in a terminal and without one.

mod common;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Host, Said};
use nix::pty::openpty;
use nix::sys::signal::{kill, Signal};
use nix::sys::termios::{tcgetattr, LocalFlags};
use nix::unistd::Pid;

const PATIENCE: Duration = Duration::from_secs(60);

impl Host {
    fn run(&self, name: &str, args: &[&str]) -> Output {
        self.command().arg("run").arg(self.layout(name)).args(args).output().unwrap()
    }

    /// Starts a guest that says `text`, and waits for that.
    fn start(&self, name: &str, text: &str) -> (Child, Reader) {
        let mut command = self.command();
        command.arg("run").arg(self.layout(name)).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut reader = Reader::new(OwnedFd::from(child.stdout.take().unwrap()).into());
        reader.expect(text);
        (child, reader)
    }

    /// Nothing of any machine is left.
    fn assert_clean(&self) {
        for dir in ["state/run", "runtime/machines/ovm", "runtime/uids"] {
            assert_eq!(fs::read_dir(self.dir.path().join(dir)).unwrap().count(), 0, "{dir}");
        }
    }
}

struct Reader {
    from: File,
    said: String,
}

impl Reader {
    fn new(from: File) -> Self {
        Self { from, said: String::new() }
    }

    fn expect(&mut self, text: &str) {
        let mut buffer = [0; 4096];
        while !self.said.contains(text) {
            let length = self.from.read(&mut buffer).unwrap();
            assert!(length > 0, "no {text:?} in {:?}", self.said);
            self.said.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    }
}

fn end(child: &mut Child) -> Option<i32> {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        assert!(begin.elapsed() < PATIENCE, "it does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id() as i32), signal).unwrap();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn the_guests_status_and_output_are_those_of_ovm_run() {
    let host = Host::new(2);
    let output = host.run("hello", &["--kernel-args", "one two=3", "--quiet"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hello from the guest\nargs: one two=3\n");
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
    for (guest, status, said) in [("panic", 134, "panicked"), ("triple", 139, "triple fault"), ("reboot", 0, "")] {
        let output = host.run(guest, &[]);
        assert_eq!(output.status.code(), Some(status), "{guest}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(said), "{guest}");
    }
    host.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn memory_and_cpus_are_those_of_the_flags() {
    let host = Host::new(2);
    let output = host.run("memtop", &["--memory", "96M"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        said.contains("top 0000000006000000") || said.contains("top 0x6000000") || said.contains("6000000"),
        "{said}"
    );
    let output = host.run("hello", &["--memory", "1M"]);
    assert_eq!(output.status.code(), Some(65));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "ovm: --memory asks for 1048576 bytes of memory; a machine has 32 MiB to 1 TiB\n"
    );
    assert_eq!(host.run("hello", &["--cpus", "33"]).status.code(), Some(65));
    host.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn typed_text_reaches_the_guest_and_its_end_does_not_end_it() {
    let host = Host::new(2);
    let mut command = host.command();
    command.arg("run").arg(host.layout("echo")).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"typed q").unwrap();
    let mut said = String::new();
    child.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    assert_eq!(said, "echo ready\ntyped bye\n");
    assert_eq!(end(&mut child), Some(0));
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn signals_press_the_power_button() {
    let host = Host::new(2);
    for sent in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let (mut child, mut said) = host.start("spin", "tick 1\n");
        signal(&child, sent);
        said.expect("power button\n");
        assert_eq!(end(&mut child), Some(0), "{sent}");
    }
    host.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_guest_that_ignores_its_button_is_killed_after_the_timeout_or_by_a_second_signal() {
    let host = Host::new(2);
    let (mut child, _said) = host.start("echo", "echo ready\n");
    let begin = Instant::now();
    signal(&child, Signal::SIGTERM);
    assert_eq!(end(&mut child), Some(137));
    assert!(begin.elapsed() >= Duration::from_secs(2));
    let (mut child, _said) = host.start("echo", "echo ready\n");
    signal(&child, Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(200));
    signal(&child, Signal::SIGTERM);
    let begin = Instant::now();
    assert_eq!(end(&mut child), Some(137));
    assert!(begin.elapsed() < Duration::from_secs(1));
    host.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_terminal_is_raw_while_the_guest_runs_and_as_before_afterwards() {
    let host = Host::new(2);
    let pty = openpty(None, None).unwrap();
    let mut command = host.command();
    let slave = || pty.slave.try_clone().unwrap();
    command.arg("run").arg(host.layout("spin")).stdin(slave()).stdout(slave()).stderr(slave());
    let mut child = command.spawn().unwrap();
    let mut master = File::from(pty.master.try_clone().unwrap());
    let mut reader = Reader::new(pty.master.into());
    reader.expect("tick 1\n");
    let raw = tcgetattr(&pty.slave).unwrap();
    assert!(!raw.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG));
    // Ctrl-C is the guest's, Ctrl-] is ours.
    master.write_all(b"\x03").unwrap();
    reader.expect("tick 3\n");
    master.write_all(b"\x1d").unwrap();
    reader.expect("power button\n");
    assert_eq!(end(&mut child), Some(0));
    let cooked = tcgetattr(&pty.slave).unwrap();
    assert!(cooked.local_flags.contains(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG));
    host.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn what_a_killed_run_leaves_the_next_one_removes() {
    let host = Host::new(2);
    let (mut child, _said) = host.start("spin", "tick 0\n");
    signal(&child, Signal::SIGKILL);
    child.wait().unwrap();
    assert_eq!(fs::read_dir(host.dir.path().join("runtime/machines/ovm")).unwrap().count(), 1);
    assert_eq!(host.run("hello", &[]).status.code(), Some(0));
    host.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn what_is_no_image_is_told_before_anything_is_made() {
    let host = Host::new(2);
    let output = host.command().args(["run", "/no/such/layout"]).output().unwrap();
    assert_eq!(output.status.code(), Some(66), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!host.dir.path().join("runtime").exists());
}

/// A cgroup of the devices hierarchy that keeps its processes from /dev/kvm; removed with this.
struct WithoutKvm(PathBuf);

impl WithoutKvm {
    fn new() -> Self {
        let dir = PathBuf::from(format!("/sys/fs/cgroup/devices/ovms-test-{}", std::process::id()));
        fs::create_dir(&dir).expect("the devices hierarchy of cgroup v1");
        // Documentation/admin-guide/devices.txt of the kernel: character device 10:232.
        fs::write(dir.join("devices.deny"), "c 10:232 rwm").unwrap();
        Self(dir)
    }
}

impl Drop for WithoutKvm {
    fn drop(&mut self) {
        let _gone = fs::remove_dir(&self.0);
    }
}

#[test]
#[ignore = "needs root, /dev/kvm and cgroup v1"]
fn dev_kvm_that_may_not_be_opened_is_named_with_the_way_out() {
    let (host, cgroup) = (Host::new(5), WithoutKvm::new());
    let command = host.command();
    let (ovm, layout) = (command.get_program().to_owned(), host.layout("hello"));
    let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", cgroup.0.display());
    let mut inside = Command::new("sh");
    inside.args(["-c", &enter, "sh"]).arg(ovm).arg("run").arg(layout).stdin(Stdio::null());
    inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));

    let said: Said = inside.output().unwrap().into();

    assert_ne!(said.code, Some(0));
    assert!(
        said.err.contains("/dev/kvm may not be opened: run as root; in a container, allow it the device"),
        "{}",
        said.err
    );
    assert!(!said.err.contains("panicked") && said.out.is_empty(), "{}{}", said.out, said.err);
    // It is refused before anything is made for a machine.
    for made in ["runtime/machines/ovm", "runtime/uids", "state/run"] {
        assert!(!host.dir.path().join(made).exists(), "{made}");
    }
}
