//! `ovm run` with bare-metal guests, in a terminal and without one.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::pty::openpty;
use nix::sys::signal::{kill, Signal};
use nix::sys::termios::{tcgetattr, LocalFlags};
use nix::unistd::Pid;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

struct Bench {
    dir: TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let vmm = Path::new(env!("CARGO_BIN_EXE_ovm")).with_file_name("ovms-vmm");
        let vmm = if vmm.exists() { vmm } else { root().join("target/release/ovms-vmm") };
        assert!(vmm.exists(), "ovms-vmm: run `make build`");
        let at = |name: &str| dir.path().join(name).display().to_string();
        let settings = format!(
            "[paths]\nstate = {:?}\nruntime = {:?}\nvmm = {:?}\n[vm]\nstop_timeout_seconds = 2\n",
            at("state"),
            at("runtime"),
            vmm.display().to_string()
        );
        fs::write(dir.path().join("ovms.toml"), settings).unwrap();
        Self { dir }
    }

    fn ovm(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ovm"));
        command.env("OVMS_CONFIG", self.dir.path().join("ovms.toml")).stdin(Stdio::null());
        command
    }

    /// A layout that boots the guest `name`.
    fn layout(&self, name: &str) -> PathBuf {
        let kernel = root().join(format!("target/guests/{name}.elf"));
        assert!(kernel.exists(), "{}: run `make guests`", kernel.display());
        let layout = self.dir.path().join(name);
        if layout.exists() {
            return layout;
        }
        let mut build = self.ovm();
        build.args(["build", "-q", "--name", "t/guest", "--version", "1", "--memory", "64M", "--kernel"]);
        let built = build.arg(kernel).arg("-o").arg(&layout).output().unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        layout
    }

    fn run(&self, name: &str, args: &[&str]) -> Output {
        self.ovm().arg("run").arg(self.layout(name)).args(args).output().unwrap()
    }

    /// Starts a guest that says `text`, and waits for that.
    fn start(&self, name: &str, text: &str) -> (Child, Reader) {
        let mut command = self.ovm();
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

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
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
    let bench = Bench::new();
    let output = bench.run("hello", &["--kernel-args", "one two=3", "--quiet"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hello from the guest\nargs: one two=3\n");
    assert_eq!((output.status.code(), String::from_utf8_lossy(&output.stderr).as_ref()), (Some(0), ""));
    for (guest, status, said) in [("panic", 134, "panicked"), ("triple", 139, "triple fault"), ("reboot", 0, "")] {
        let output = bench.run(guest, &[]);
        assert_eq!(output.status.code(), Some(status), "{guest}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(said), "{guest}");
    }
    bench.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn memory_and_cpus_are_those_of_the_flags() {
    let bench = Bench::new();
    let output = bench.run("memtop", &["--memory", "96M"]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        said.contains("top 0000000006000000") || said.contains("top 0x6000000") || said.contains("6000000"),
        "{said}"
    );
    let output = bench.run("hello", &["--memory", "1M"]);
    assert_eq!(output.status.code(), Some(65));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "ovm: --memory asks for 1048576 bytes of memory; a machine has 32 MiB to 1 TiB\n"
    );
    assert_eq!(bench.run("hello", &["--cpus", "33"]).status.code(), Some(65));
    bench.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn typed_text_reaches_the_guest_and_its_end_does_not_end_it() {
    let bench = Bench::new();
    let mut command = bench.ovm();
    command.arg("run").arg(bench.layout("echo")).stdin(Stdio::piped()).stdout(Stdio::piped());
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
    let bench = Bench::new();
    for sent in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        let (mut child, mut said) = bench.start("spin", "tick 1\n");
        signal(&child, sent);
        said.expect("power button\n");
        assert_eq!(end(&mut child), Some(0), "{sent}");
    }
    bench.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_guest_that_ignores_its_button_is_killed_after_the_timeout_or_by_a_second_signal() {
    let bench = Bench::new();
    let (mut child, _said) = bench.start("echo", "echo ready\n");
    let begin = Instant::now();
    signal(&child, Signal::SIGTERM);
    assert_eq!(end(&mut child), Some(137));
    assert!(begin.elapsed() >= Duration::from_secs(2));
    let (mut child, _said) = bench.start("echo", "echo ready\n");
    signal(&child, Signal::SIGTERM);
    std::thread::sleep(Duration::from_millis(200));
    signal(&child, Signal::SIGTERM);
    let begin = Instant::now();
    assert_eq!(end(&mut child), Some(137));
    assert!(begin.elapsed() < Duration::from_secs(1));
    bench.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn a_terminal_is_raw_while_the_guest_runs_and_as_before_afterwards() {
    let bench = Bench::new();
    let pty = openpty(None, None).unwrap();
    let mut command = bench.ovm();
    let slave = || pty.slave.try_clone().unwrap();
    command.arg("run").arg(bench.layout("spin")).stdin(slave()).stdout(slave()).stderr(slave());
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
    bench.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn what_a_killed_run_leaves_the_next_one_removes() {
    let bench = Bench::new();
    let (mut child, _said) = bench.start("spin", "tick 0\n");
    signal(&child, Signal::SIGKILL);
    child.wait().unwrap();
    assert_eq!(fs::read_dir(bench.dir.path().join("runtime/machines/ovm")).unwrap().count(), 1);
    assert_eq!(bench.run("hello", &[]).status.code(), Some(0));
    bench.assert_clean();
}

#[test]
#[ignore = "needs /dev/kvm and root"]
fn what_is_no_image_is_told_before_anything_is_made() {
    let bench = Bench::new();
    let output = bench.ovm().args(["run", "/no/such/layout"]).output().unwrap();
    assert_eq!(output.status.code(), Some(66), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!bench.dir.path().join("runtime").exists());
}
