//! Machines of the real `ovms-vmm` with the bare-metal guests of `make guests`.
#![allow(dead_code, reason = "each test file uses its part")]

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use ovms_artifact::manifest::Manifest;
use ovms_bundle::unpack::instantiate;
use ovms_bundle::{Disk, Record};
use ovms_config::Settings;
use ovms_disk::Table;
use ovms_engine::{CreateSpec, Engine, Machine, Stdio};
use tempfile::TempDir;

/// A directory for everything, an engine, and names of its own.
pub struct Host {
    pub dir: TempDir,
    pub engine: Engine,
    pub settings: Settings,
}

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

impl Host {
    pub fn new() -> Self {
        Self::with(|_| ())
    }

    pub fn with(change: impl FnOnce(&mut Settings)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings::default();
        settings.paths.runtime = dir.path().join("run");
        settings.paths.vmm = vmm();
        change(&mut settings);
        Self { dir, engine: Engine::new(settings.clone()), settings }
    }

    /// A bundle that boots the guest `name`, with a disk of 1 MiB.
    pub fn bundle(&self, name: &str) -> PathBuf {
        let guest = root().join(format!("target/guests/{name}.elf"));
        assert!(guest.exists(), "{}: run `make guests`", guest.display());
        let dir = self.dir.path().join(unique("bundle"));
        fs::create_dir(&dir).unwrap();
        let table = dir.join("table");
        Table::empty(1 << 20).unwrap().write_to(&File::create(&table).unwrap()).unwrap();
        let disk =
            Disk { virtual_size: 1 << 20, table, layers: Vec::new(), frozen: Vec::new(), top: None, read_only: false };
        let template = Record {
            version: ovms_bundle::RECORD_VERSION,
            image: None,
            manifest: Manifest::new("test/guest", "1"),
            kernel: Some(guest),
            initrd: None,
            disk: Some(disk),
            ram: None,
        };
        instantiate(&template, &dir).unwrap()
    }

    /// What a caller asks for to boot the guest `name` in 64 MiB, and the console's other end.
    pub fn spec(&self, name: &str) -> (CreateSpec, Console) {
        let (output, write) = std::io::pipe().unwrap();
        let mut spec = CreateSpec {
            id: unique("vm"),
            namespace: "engine-test".into(),
            bundle: self.bundle(name),
            stdio: Stdio { stdout: Some(write.into()), ..Stdio::default() },
            ..CreateSpec::default()
        };
        spec.wishes.spec_memory = Some(64 << 20);
        (spec, Console { pipe: File::from(OwnedFd::from(output)), said: String::new() })
    }

    /// Creates and starts a machine.
    pub fn run(&self, name: &str) -> (Machine, Console) {
        let (spec, console) = self.spec(name);
        let machine = self.engine.create(spec).unwrap_or_else(|err| panic!("{}", err.chain()));
        machine.start().unwrap();
        (machine, console)
    }

    /// Nothing of the machine is left on the host.
    pub fn assert_clean(&self, id: &str, pid: u32, cgroup: &[PathBuf]) {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "process {pid} is left");
        for dir in cgroup {
            assert!(!dir.exists(), "{} is left", dir.display());
        }
        assert!(!self.settings.paths.runtime.join("machines/engine-test").join(id).exists());
        assert_eq!(fs::read_dir(self.settings.paths.runtime.join("uids")).unwrap().count(), 0);
    }
}

/// What the guest says.
pub struct Console {
    pipe: File,
    said: String,
}

impl Console {
    /// Reads until the guest has said `text`.
    pub fn expect(&mut self, text: &str) {
        let mut buffer = [0; 4096];
        while !self.said.contains(text) {
            let length = self.pipe.read(&mut buffer).unwrap();
            assert!(length > 0, "the console ended before {text:?}: {:?}", self.said);
            self.said.push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    }

    /// Everything up to the end.
    pub fn rest(mut self) -> String {
        let mut rest = String::new();
        self.pipe.read_to_string(&mut rest).unwrap();
        self.said + &rest
    }
}

/// A name that no other test of this process has.
pub fn unique(what: &str) -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    format!("{what}-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed))
}

/// Waits until `done` holds.
pub fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A line of /proc/PID/status.
pub fn proc_status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.split_ascii_whitespace().collect::<Vec<_>>().join(" ")
}

/// The VMM of the build that this test belongs to, or the release.
fn vmm() -> PathBuf {
    let beside = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("ovms-vmm");
    let release = root().join("target/release/ovms-vmm");
    let found = [beside, release].into_iter().find(|path| path.exists());
    found.expect("ovms-vmm: run `cargo build -p ovms-vmm` or `make build`")
}

pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}
