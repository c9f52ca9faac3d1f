//! A machine whose VMM is played by a test: the process is a `sleep`, the messages are the test's.

use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::sync::{mpsc, Arc};
use std::time::{Duration, Instant, SystemTime};

use ovms_bundle::unpack::instantiate;
use ovms_bundle::{Disk, Manifest, Ram, RECORD_VERSION};
use ovms_config::settings::JailSettings;
use ovms_disk::Table;
use ovms_proto::control::{Answer, Command, ExitReason, FromVmm, Request};
use ovms_proto::Channel;
use tempfile::TempDir;

use crate::cgroup::Cgroup;
use crate::machine::{limit_sends, Machine, MachineEvent, State};
use crate::process::Process;
use crate::record::{Claim, Record, Slot};
use crate::serve::Server;
use crate::shared::{Inner, Origin, Parts, Patience, Remains};
use crate::uid::UidLease;
use crate::{log, monitor};

/// Guest memory of the machine in bytes.
pub(crate) const MEMORY: u64 = 64 << 20;

/// The machine, and the test's ends of it.
pub(crate) struct Stage {
    pub(crate) machine: Machine,
    pub(crate) vmm: Channel,
    pub(crate) log: std::fs::File,
    pub(crate) events: mpsc::Receiver<MachineEvent>,
    pub(crate) runtime: TempDir,
}

/// A machine whose VMM is played by the test, in the state `Created`.
pub(crate) fn stage() -> Stage {
    stage_with(|_| (Origin::default(), None))
}

/// As [`stage`], of a machine that is made from what `origin` makes in a directory, and that may record its working set.
#[allow(clippy::zombie_processes, reason = "the machine's monitor reaps it")]
pub(crate) fn stage_with(origin: impl FnOnce(&Path) -> (Origin, Option<std::fs::File>)) -> Stage {
    let runtime = tempfile::tempdir().unwrap();
    let (origin, recording) = origin(runtime.path());
    let Claim::Ours(slot) = Slot::claim(runtime.path(), "ns", "vm1").unwrap() else { panic!("the name is free") };
    let uid = UidLease::take(runtime.path(), &JailSettings { uid_base: 1000, uid_count: 10 }).unwrap();
    let record = Record {
        id: "vm1".into(),
        namespace: "ns".into(),
        state: State::Creating,
        created: SystemTime::now(),
        process: None,
        cgroup: Vec::new(),
        uid: Some(uid.uid()),
        tops: Vec::new(),
        vcpus: 1,
        memory: MEMORY,
        timeline: Vec::new(),
        exit: None,
        instance: None,
    };
    let child = Program::new("sleep").arg("600").spawn().unwrap();
    let (channel, vmm) = Channel::pair().unwrap();
    limit_sends(&channel).unwrap();
    let second = Duration::from_secs(1);
    let (log, log_end) = log::pipe("vm1").unwrap();
    let inner = Arc::new(Inner::new(Parts {
        patience: Patience { answer: second, balloon: second, farewell: second },
        process: Process::adopt(child.id()).unwrap(),
        channel,
        cgroup: Cgroup::None,
        memory: MEMORY,
        overhead: 1 << 20,
        origin,
        began: Instant::now(),
        timeline: vec![("spawned".into(), 100)],
        stderr: None,
        ram_lock: None,
        recording,
        remains: Remains { slot, record, _uid: uid },
    }));
    let server = Server::listen(&crate::record::socket(runtime.path(), "ns", "vm1")).unwrap();
    monitor::start(Arc::clone(&inner), None, log, Some(server)).unwrap();
    inner.change(|shared| shared.state = State::Created);
    let machine = Machine::new(inner);
    let (tell, events) = mpsc::channel();
    machine.subscribe(move |event| tell.send(event.clone()).unwrap());
    Stage { machine, vmm, log: log_end.into(), events, runtime }
}

impl Stage {
    /// Answers the next request.
    pub(crate) fn answer(&self, expected: Command) {
        let (request, _) = self.vmm.recv::<Request>().unwrap();
        assert_eq!(request.command, expected);
        self.say(&FromVmm::Reply { id: request.id, result: Ok(Answer::Done) });
    }

    pub(crate) fn say(&self, message: &FromVmm) {
        self.vmm.send(message, &[]).unwrap();
    }

    /// Starts the machine, the VMM answering.
    pub(crate) fn start(&self) {
        std::thread::scope(|scope| {
            let machine = &self.machine;
            let starting = scope.spawn(|| machine.start());
            self.answer(Command::Run);
            starting.join().unwrap().unwrap();
        });
        assert_eq!(self.event(), MachineEvent::Started);
    }

    pub(crate) fn event(&self) -> MachineEvent {
        self.events.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    /// Waits for an end by a fault of the VMM and gives its message.
    pub(crate) fn fault(&self) -> String {
        let exit = self.machine.wait_timeout(Duration::from_secs(10)).expect("the machine ends");
        assert_eq!(exit.status, 139);
        match exit.reason {
            ExitReason::Fault { message } => message,
            other => panic!("no fault: {other:?}"),
        }
    }

    pub(crate) fn kill(&self) {
        self.machine.kill().unwrap();
        self.machine.wait();
    }
}

/// A bundle with a disk of 1 MiB in a directory of its own, whose machine may write it.
pub(crate) fn bundle(dir: &Path, ram: Option<Ram>) -> Origin {
    let dir = dir.join("bundle");
    std::fs::create_dir(&dir).unwrap();
    let table = dir.join("table");
    Table::empty(1 << 20).unwrap().write_to(&std::fs::File::create(&table).unwrap()).unwrap();
    let disk =
        Disk { virtual_size: 1 << 20, table, layers: Vec::new(), frozen: Vec::new(), top: None, read_only: false };
    let template = ovms_bundle::Record {
        version: RECORD_VERSION,
        image: Some("sha256:11".into()),
        manifest: Manifest::new("test/image", "1"),
        kernel: None,
        initrd: None,
        disk: Some(disk),
        ram: ram.clone(),
    };
    let bundle = instantiate(&template, &dir).unwrap();
    Origin { bundle, holder: "machine ns/vm1".into(), writable: true, ram }
}

/// The RAM that a machine resumed from, whose working set is kept in `dir`.
pub(crate) fn ram(dir: &Path) -> Ram {
    let digest = |digit: &str| format!("sha256:{}", digit.repeat(64));
    Ram {
        digest: digest("a"),
        parents: vec![digest("b")],
        state: PathBuf::from("/no/state"),
        memory: PathBuf::from("/no/memory"),
        working_set: dir.join("working-set"),
        mlock: false,
    }
}
