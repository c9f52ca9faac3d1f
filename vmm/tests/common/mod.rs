//! Starts the real `ovms-vmm` as the engine would: control socket as descriptor 3, own namespaces, everything else by
//! packet.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod capture;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::Kvm;
use nix::mount::{mount, MsFlags};
use ovms_config::vm::{
    BootConfig, ConsoleConfig, DiskConfig, JailConfig, RestoreConfig, StartConfig, TopConfig, VmConfig,
    VM_CONFIG_VERSION,
};
use ovms_disk::{Stack, StackFiles, Table, Top, TopFiles};
use ovms_proto::control::{Answer, Command, Event, ExitReason, FailureKind, FromVmm, Request, Status, Timeline};
use ovms_proto::{Channel, ChannelError};
use zerocopy::IntoBytes;

/// How long anything in a test may take.
const PATIENCE: Duration = Duration::from_secs(60);
/// The privilege to lock memory without limit (include/uapi/linux/capability.h).
const CAP_IPC_LOCK: libc::c_ulong = 14;

/// The program; Cargo names it to tests, not to examples, which start none.
const VMM: Option<&str> = option_env!("CARGO_BIN_EXE_ovms-vmm");

/// The bare-metal guest `name` (make guests).
pub fn guest(name: &str) -> File {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../target/guests/{name}.elf"));
    File::open(&path).unwrap_or_else(|err| panic!("{}: {err}: run `make guests`", path.display()))
}

/// A machine to be started.
pub struct Setup {
    pub config: VmConfig,
    pub fds: Vec<OwnedFd>,
    may_lock: bool,
}

impl Setup {
    /// One vCPU, 64 MiB, no disk, a console.
    pub fn new(kernel: File) -> Self {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("/dev/kvm");
        let config = VmConfig {
            version: VM_CONFIG_VERSION,
            id: "test".into(),
            vcpus: 1,
            memory: 64 << 20,
            kvm: 0,
            cpuid: 1,
            userfault: None,
            start: StartConfig::Boot(BootConfig { kernel: 4, initrd: None, cmdline: String::new() }),
            disks: Vec::new(),
            console: ConsoleConfig::default(),
            jail: JailConfig {
                uid: 64_000,
                gid: 64_000,
                root: 2,
                netns: 3,
                hostname: "test".into(),
                max_file_size: 1 << 40,
                max_open_files: 512,
            },
            log_level: "debug".into(),
        };
        let cpuid = supported_cpuid(&kvm);
        Self {
            config,
            fds: vec![kvm.into(), cpuid.into(), empty_root().into(), empty_netns().into(), kernel.into()],
            may_lock: true,
        }
    }

    /// One vCPU, 64 MiB, no disk, a console: goes on from a snapshot's unpacked files.
    pub fn restore(state: OwnedFd, memory: OwnedFd) -> Self {
        let mut setup = Self::new(state.into());
        setup.fds.push(memory);
        setup.config.start = StartConfig::Restore(RestoreConfig {
            state: 4,
            memory: 5,
            working_set: None,
            record_working_set: None,
            mlock: false,
        });
        setup
    }

    pub fn restore_config(&mut self) -> &mut RestoreConfig {
        match &mut self.config.start {
            StartConfig::Restore(restore) => restore,
            StartConfig::Boot(_) => panic!("the machine boots"),
        }
    }

    pub fn args(mut self, cmdline: &str) -> Self {
        self.boot().cmdline = cmdline.into();
        self
    }

    fn boot(&mut self) -> &mut BootConfig {
        match &mut self.config.start {
            StartConfig::Boot(boot) => boot,
            StartConfig::Restore(_) => panic!("the machine is restored"),
        }
    }

    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.config.vcpus = vcpus;
        self
    }

    pub fn memory(mut self, bytes: u64) -> Self {
        self.config.memory = bytes;
        self
    }

    pub fn fd(&mut self, fd: impl Into<OwnedFd>) -> u32 {
        self.fds.push(fd.into());
        self.fds.len() as u32 - 1
    }

    pub fn initrd(mut self, file: File) -> Self {
        let initrd = self.fd(file);
        self.boot().initrd = Some(initrd);
        self
    }

    /// The VMM may hold writers back.
    pub fn userfault(mut self) -> Self {
        let device = File::options().read(true).write(true).open("/dev/userfaultfd").expect("/dev/userfaultfd");
        self.config.userfault = Some(self.fd(device));
        self
    }

    /// A disk without layers: table, top's data and top's map.
    pub fn disk(mut self, table: File, data: File, map: File) -> Self {
        let (table, data, map) = (self.fd(table), self.fd(data), self.fd(map));
        let top = TopConfig { data, map };
        self.config.disks.push(DiskConfig {
            table,
            layers: vec![],
            frozen: vec![],
            top,
            read_only: false,
            serial: "disk".into(),
        });
        self
    }

    /// Starts the VMM and waits until it has built the machine.
    pub fn start(self) -> Vmm {
        let mut vmm = self.spawn();
        match vmm.next() {
            FromVmm::Configured { timeline } => vmm.timeline = timeline,
            other => panic!("not configured: {other:?}"),
        }
        vmm
    }

    /// Starts the VMM and gives the reason for which it refuses.
    pub fn refused(self) -> String {
        self.refused_as().1
    }

    /// As [`Setup::refused`], with what the engine is to make of it.
    pub fn refused_as(self) -> (FailureKind, String) {
        let mut vmm = self.spawn();
        let FromVmm::Failed { kind, message } = vmm.next() else { panic!("the machine was built") };
        assert_eq!(vmm.child.wait().unwrap().code(), Some(126));
        (kind, message)
    }

    /// The VMM may lock no memory, whoever it is.
    pub fn without_locking(mut self) -> Self {
        self.may_lock = false;
        self
    }

    /// Starts the VMM; what comes of it is to be seen.
    pub fn spawn(mut self) -> Vmm {
        let (console_out, vmm_out) = pipe();
        let (vmm_in, console_in) = pipe();
        self.config.console.output = Some(self.fd(vmm_out));
        self.config.console.input = Some(self.fd(vmm_in));
        let (ours, theirs) = Channel::pair().unwrap();
        let begin = Instant::now();
        let child = spawn_process(theirs, self.may_lock);
        let fds: Vec<_> = self.fds.iter().map(AsFd::as_fd).collect();
        ours.send(&self.config, &fds).unwrap();
        drop(self.fds);
        Vmm {
            child,
            channel: Some(ours),
            input: Some(console_in),
            output: console_out,
            said: String::new(),
            timeline: Timeline::default(),
            events: Vec::new(),
            replies: BTreeMap::new(),
            next_id: 0,
            begin,
        }
    }
}

fn spawn_process(control: Channel, may_lock: bool) -> Child {
    let control = OwnedFd::from(control);
    let mut process = Process::new(VMM.expect("a test"));
    process.stdin(Stdio::null()).stdout(Stdio::null()).env_clear();
    let raw = control.as_raw_fd();
    // SAFETY: the closure makes system calls only.
    unsafe {
        process.pre_exec(move || {
            if !may_lock {
                let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
                if libc::setrlimit(libc::RLIMIT_MEMLOCK, &none) < 0
                    || libc::prctl(libc::PR_CAPBSET_DROP, CAP_IPC_LOCK) < 0
                {
                    return Err(std::io::Error::last_os_error());
                }
            }
            let namespaces = libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
            let done = if raw == 3 { libc::fcntl(3, libc::F_SETFD, 0) } else { libc::dup2(raw, 3) };
            if done < 0 || libc::unshare(namespaces) < 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
    process.spawn().expect("ovms-vmm")
}

/// What `kvm` says that processors can do, as the engine passes it.
fn supported_cpuid(kvm: &File) -> File {
    // SAFETY: a descriptor that was copied for this.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.try_clone().unwrap().into_raw_fd()) };
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(cpuid.as_slice().as_bytes()).unwrap();
    file
}

/// A network namespace that the test itself does not join.
fn empty_netns() -> File {
    let make = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("root");
        File::open("/proc/thread-self/ns/net").unwrap()
    };
    std::thread::spawn(make).join().unwrap()
}

/// A mount namespace that the test itself does not join: what is mounted on its root is what a joiner gets.
fn empty_root() -> File {
    let make = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("root");
        let opened = File::open("/proc/thread-self/ns/mnt").unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        mount(Some("empty"), "/", Some("tmpfs"), MsFlags::MS_RDONLY, none).unwrap();
        opened
    };
    std::thread::spawn(make).join().unwrap()
}

fn pipe() -> (File, File) {
    let (read, write) = std::io::pipe().unwrap();
    (OwnedFd::from(read).into(), OwnedFd::from(write).into())
}

/// A running VMM.
pub struct Vmm {
    pub child: Child,
    channel: Option<Channel>,
    input: Option<File>,
    output: File,
    said: String,
    pub timeline: Timeline,
    events: Vec<Event>,
    replies: BTreeMap<u64, Result<Answer, String>>,
    next_id: u64,
    pub begin: Instant,
}

impl Vmm {
    fn next(&mut self) -> FromVmm {
        self.channel.as_ref().unwrap().recv().expect("a message from the VMM").0
    }

    /// What the VMM says of the machine that it is to build.
    pub fn first(&mut self) -> FromVmm {
        self.next()
    }

    /// Whether the machine was built; otherwise the VMM has said why not.
    pub fn configured(&mut self) -> bool {
        match self.next() {
            FromVmm::Configured { .. } => true,
            FromVmm::Failed { .. } => false,
            other => panic!("unexpected {other:?}"),
        }
    }

    /// Sends a command to a VMM that may have ended already.
    pub fn try_last(&mut self, command: Command) -> bool {
        let request = Request { id: u64::MAX, command };
        self.channel.as_ref().unwrap().send(&request, &[]).is_ok()
    }

    /// Sends a command and waits for its answer; events that come meanwhile are kept.
    pub fn try_command(&mut self, command: Command) -> Result<Answer, String> {
        self.try_command_with(command, &[])
    }

    /// As [`Vmm::try_command`], with descriptors beside it.
    pub fn try_command_with(&mut self, command: Command, files: &[File]) -> Result<Answer, String> {
        let id = self.ask(command, files);
        self.answer(id)
    }

    /// Sends a command and does not wait; gives its number.
    pub fn ask(&mut self, command: Command, files: &[File]) -> u64 {
        self.next_id += 1;
        let request = Request { id: self.next_id, command };
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        self.channel.as_ref().unwrap().send(&request, &fds).unwrap();
        self.next_id
    }

    /// Waits for the answer to the command of that number; what comes meanwhile is kept.
    pub fn answer(&mut self, number: u64) -> Result<Answer, String> {
        loop {
            if let Some(result) = self.replies.remove(&number) {
                return result;
            }
            self.listen();
        }
    }

    /// Waits until an event has come that `is` likes.
    pub fn wait_event(&mut self, is: impl Fn(&Event) -> bool) {
        while !self.events.iter().any(&is) {
            self.listen();
        }
    }

    fn listen(&mut self) {
        match self.next() {
            FromVmm::Reply { id, result } => drop(self.replies.insert(id, result)),
            FromVmm::Event(event) => self.events.push(event),
            other => panic!("unexpected {other:?}"),
        }
    }

    pub fn command(&mut self, command: Command) {
        assert_eq!(self.try_command(command.clone()), Ok(Answer::Done), "{command:?}");
    }

    pub fn status(&mut self) -> Status {
        match self.try_command(Command::Status) {
            Ok(Answer::Status(status)) => status,
            other => panic!("no status: {other:?}"),
        }
    }

    /// Types `text` on the console.
    pub fn type_text(&mut self, text: &str) {
        self.input.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// Reads console output until it holds `text`; gives everything said so far.
    pub fn expect(&mut self, text: &str) -> String {
        self.expect_within(text, PATIENCE)
    }

    /// As [`Vmm::expect`], with a patience of its own.
    pub fn expect_within(&mut self, text: &str, patience: Duration) -> String {
        let begin = Instant::now();
        let mut buffer = [0u8; 4096];
        while !self.said.contains(text) {
            assert!(begin.elapsed() < patience, "no {text:?} in {:?}", self.said);
            let mut poll = libc::pollfd { fd: self.output.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd for as long as the call lasts.
            if unsafe { libc::poll(&mut poll, 1, 1000) } == 0 {
                continue;
            }
            let count = self.output.read(&mut buffer).unwrap();
            assert!(count > 0, "the console ended before {text:?}: {:?}", self.said);
            self.said.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
        self.said.clone()
    }

    /// What has been said since the last call, without waiting.
    pub fn drain(&mut self) -> String {
        let mut buffer = [0u8; 65536];
        loop {
            let mut poll = libc::pollfd { fd: self.output.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one pollfd for as long as the call lasts.
            if unsafe { libc::poll(&mut poll, 1, 0) } == 0 {
                return std::mem::take(&mut self.said);
            }
            let count = self.output.read(&mut buffer).unwrap();
            self.said.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    }

    /// Lets the engine's end of the control socket go.
    pub fn hang_up(&mut self) {
        self.channel = None;
    }

    /// Waits for the end: why, what the console said in all, the exit status.
    pub fn end(mut self) -> (ExitReason, String, i32) {
        let reason = loop {
            let at = self.events.iter().position(|event| matches!(event, Event::Exited(_)));
            if let Some(Event::Exited(reason)) = at.map(|at| self.events.remove(at)) {
                break reason;
            }
            self.listen();
        };
        let mut rest = String::new();
        self.output.read_to_string(&mut rest).unwrap();
        self.said.push_str(&rest);
        assert!(matches!(self.channel.as_ref().unwrap().recv::<FromVmm>(), Err(ChannelError::Closed)));
        let status = self.child.wait().unwrap().code().unwrap();
        (reason, self.said.clone(), status)
    }

    pub fn events(&self) -> &[Event] {
        &self.events
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Starts `setup`, runs it to its end.
pub fn run(setup: Setup) -> (ExitReason, String, i32) {
    let mut vmm = setup.start();
    vmm.command(Command::Run);
    vmm.end()
}

/// A file system of its own, which can be stopped: who writes to it then waits until it goes on.
pub struct Stoppable {
    dir: tempfile::TempDir,
}

impl Stoppable {
    pub fn new() -> Self {
        let this = Self { dir: tempfile::tempdir().unwrap() };
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(64 << 20).unwrap();
        tool("mkfs.ext4", &["-q", image.path().to_str().unwrap()]);
        // The mount holds the loop device, which holds the file.
        tool("mount", &["-o", "loop", image.path().to_str().unwrap(), this.path()]);
        this
    }

    pub fn path(&self) -> &str {
        self.dir.path().to_str().unwrap()
    }

    pub fn stop(&self) {
        tool("fsfreeze", &["-f", self.path()]);
    }

    pub fn go_on(&self) {
        tool("fsfreeze", &["-u", self.path()]);
    }
}

impl Drop for Stoppable {
    fn drop(&mut self) {
        let quietly = |program: &str, args: &[&str]| {
            let _ = Process::new(program).args(args).stderr(Stdio::null()).status();
        };
        quietly("fsfreeze", &["-u", self.path()]);
        quietly("umount", &["-l", self.path()]);
    }
}

fn tool(program: &str, args: &[&str]) {
    let status = Process::new(program).args(args).status().unwrap_or_else(|err| panic!("{program}: {err}"));
    assert!(status.success(), "{program} {args:?}: {status}");
}

/// A disk without layers: reads as zeroes where nothing was written. Its tops, oldest first.
pub struct Disk {
    dir: PathBuf,
    size: u64,
    table: File,
    tops: Vec<[File; 2]>,
}

impl Disk {
    pub fn new(size: u64) -> Self {
        Self::new_in(std::env::temp_dir(), size)
    }

    /// A disk whose tops lie in a directory.
    pub fn new_in(dir: impl Into<PathBuf>, size: u64) -> Self {
        let table = tempfile::tempfile().unwrap();
        Table::empty(size).unwrap().write_to(&table).unwrap();
        let mut disk = Self { dir: dir.into(), size, table, tops: Vec::new() };
        disk.add_top();
        disk
    }

    /// Writes what it holds before any machine has it.
    pub fn begin_with(&self, content: &[u8]) {
        let table = self.table.try_clone().unwrap();
        let [data, map] = self.top(0);
        let files = StackFiles { table, layers: vec![], frozen: vec![], top: Some(TopFiles { data, map }) };
        let stack = Stack::open(files, false).unwrap();
        stack.write_at(0, content).unwrap();
        stack.flush().unwrap();
    }

    /// Makes another top; gives its data and map.
    pub fn add_top(&mut self) -> [File; 2] {
        let files = [(); 2].map(|()| tempfile::tempfile_in(&self.dir).unwrap());
        Top::create(&files[0], &files[1], self.size).unwrap();
        self.tops.push(files);
        self.top(self.tops.len() - 1)
    }

    fn top(&self, index: usize) -> [File; 2] {
        self.tops[index].each_ref().map(|file| file.try_clone().unwrap())
    }

    /// The disk with all its tops; the last one is written.
    pub fn add_to(&self, setup: Setup) -> Setup {
        let [data, map] = self.top(self.tops.len() - 1);
        let mut setup = setup.disk(self.table.try_clone().unwrap(), data, map);
        for [data, map] in (0..self.tops.len() - 1).map(|index| self.top(index)) {
            let top = TopConfig { data: setup.fd(data), map: setup.fd(map) };
            setup.config.disks.last_mut().unwrap().frozen.push(top);
        }
        setup
    }

    /// A disk like this one without its last top, and an empty one in its place.
    pub fn fork(&self) -> Self {
        let table = self.table.try_clone().unwrap();
        let mut fork = Self { dir: self.dir.clone(), size: self.size, table, tops: Vec::new() };
        fork.tops.extend((0..self.tops.len() - 1).map(|index| self.top(index)));
        fork.add_top();
        fork
    }

    /// The disk as its first `tops` tops show it now, seen from the host.
    pub fn open(&self, tops: usize) -> Stack {
        let table = self.table.try_clone().unwrap();
        let mut frozen: Vec<_> =
            (0..tops).map(|index| self.top(index)).map(|[data, map]| TopFiles { data, map }).collect();
        let top = frozen.pop();
        Stack::open(StackFiles { table, layers: vec![], frozen, top }, true).unwrap()
    }
}
