//! `ovm run`: starts an image from the local store or an OCI layout, without any daemon.
//!
//! ```text
//!  store, layout ──Cache──> template ──instantiate──> <state>/run/<id>/ ──Engine──> machine
//!                                                                     │  console = stdin, stdout (by two pipes)
//!  SIGTERM, SIGINT, SIGHUP, Ctrl-] ──> power button, after a while or a second time: kill
//!  exit status of the guest ──────────────────────────────────────────┘
//! ```
//! An image that carries RAM resumes, and must do so within milliseconds: from a prepared cache a start reads the index,
//! one manifest's name and one template; nothing is hashed, parsed or synced, and what can wait (clearing up after killed
//! runs) waits until the guest runs.

mod detached;
pub mod instance;

use std::fs::File;
use std::hash::BuildHasher;
use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use clap::{Parser, ValueEnum};
use ovms_artifact::digest::Digest;
use ovms_bundle::unpack::{instantiate, Cache, Held, Options};
use ovms_bundle::worker::Launcher;
use ovms_bundle::Record;
use ovms_config::settings::RamPolicy;
use ovms_config::size::parse_size;
use ovms_config::Settings;
use ovms_engine::{
    BootChoice, CreateSpec, Engine, ExitInfo, ExitReason, Kind, Machine, MachineEvent, OnIncompatible, Reservation,
    Stdio, Wishes,
};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::error::CliError;
use crate::images::{self, Found};
use crate::progress::Steps;
use crate::scratch;
use crate::terminal::{self, Console, RawMode, Signals};
use instance::{Ended, Instance, Kept, Origin};

/// Machines of `ovm run` have a namespace of their own beside containerd's.
pub const NAMESPACE: &str = "ovm";
/// Environment variable that names what is logged to stderr: `warn`, `debug`, `ovms_engine=trace`, …
const LOG_ENV: &str = "OVMS_LOG";

/// What `ovm run` takes.
#[derive(Parser)]
#[command(
    after_help = "The console is this terminal: every key goes to the guest but Ctrl-], which presses the power \
    button, and, typed again, ends the machine at once. SIGTERM, SIGINT and SIGHUP do the same; after \
    vm.stop_timeout_seconds of ovms.toml (30) the machine is ended by force.\n\n\
    An image that carries RAM (ovm snapshot makes such images) resumes where it was taken; --boot cold boots it from \
    its disk instead.\n\n\
    What the guest writes to its disk is gone when it ends. Its exit status is that of `ovm run`: 0 power-off or reset, \
    134 kernel panic, 137 killed, 139 triple fault or a fault of the machine. With -d it is shown by ovm ps, and what \
    the guest has written by ovm logs, until ovm rm.\n\n\
    Examples:\n  ovm run debian.tar --memory 1G --cpus 2\n  ovm run -d --name web localhost:5000/demo/web:snap"
)]
pub struct Args {
    /// An image of the local store, by its name or digest; or an OCI layout, a directory or a tar
    #[arg(value_name = "IMAGE|LAYOUT")]
    image: String,
    /// Which image of the layout, if it holds several
    #[arg(short, long, value_name = "NAME")]
    tag: Option<String>,
    /// Leave the machine running in the background and print its id
    #[arg(short, long)]
    detach: bool,
    /// With -d: leave nothing of the machine once it has ended
    #[arg(long, requires = "detach")]
    rm: bool,
    /// The machine's memory; by default the image's, then ovms.toml's
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// The number of vCPUs; by default the image's, then ovms.toml's
    #[arg(short, long, value_name = "N")]
    cpus: Option<u32>,
    /// The machine's id; by default one of its own
    #[arg(short, long)]
    name: Option<String>,
    /// Appended to the image's kernel command line
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    kernel_args: Option<String>,
    /// The guest may not write to its disk
    #[arg(long)]
    read_only: bool,
    /// How an image that carries RAM starts
    #[arg(long, value_name = "HOW", default_value = "auto")]
    boot: Boot,
    /// What to do if this host cannot resume the image's RAM
    #[arg(long, value_name = "WHAT", default_value = "refuse")]
    on_incompatible: Incompatible,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
    /// We are the keeper of the detached machine of this id.
    #[arg(long, hide = true, value_name = "ID")]
    keeper: Option<String>,
    /// The layout's absolute path, for the keeper, which leaves the working directory.
    #[arg(long, hide = true, value_name = "DIR")]
    keeper_layout: Option<PathBuf>,
}

/// How an image that carries RAM starts.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Boot {
    /// Resumes, where the image carries RAM.
    Auto,
    /// Boots from its disk.
    Cold,
}

/// What becomes of an image whose RAM cannot be resumed here.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Incompatible {
    /// An error that names the feature that lacks.
    Refuse,
    /// It boots from its disk.
    Boot,
}

/// Runs the verb; the exit code is the guest's.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    let began = Instant::now();
    start_log();
    if !terminal::is_root() {
        return Err(CliError::not_permitted(
            "ovm run makes namespaces, cgroups and user ids for the machine: run it as root (sudo ovm run ...)",
        ));
    }
    let settings = Settings::load().map_err(CliError::invalid)?;
    if let Some(id) = args.keeper.clone() {
        return Ok(keep(&args, &settings, id, began));
    }
    let id = args.name.clone().unwrap_or_else(fresh_id);
    if args.detach {
        let found = images::find(&settings, &args.image, args.tag.as_deref())?;
        // The keeper starts from what is prepared here, where progress can be shown.
        let (_template, _held) = prepare(&args, &settings, &found)?;
        let layout = std::path::absolute(found.layout.path()).map_err(CliError::io)?;
        return detached::launch(&id, &layout);
    }
    let mut start = Start::prepare(&args, &settings, id, began)?;
    let (console, input, output) = Console::open().map_err(CliError::io)?;
    start.spec.stdio = Stdio { stdin: Some(input), stdout: Some(output), stderr: None };
    let ear = Ear::new();
    // Before the machine is there, whose first byte waits for nothing then, and may be answered by keys.
    let raw = RawMode::enter().map_err(CliError::io)?;
    let (keyboard, written) = console.write_out().map_err(CliError::io)?;
    let (machine, _instance, signals) = start.create()?;
    let stopper = ear.stopper();
    let started = || keyboard.read_in(raw.is_some(), stopper);
    let exit = attend(&machine, &settings, signals, ear, written, started);
    drop(raw);
    machine.delete()?;
    exit.map(|exit| report(&exit))
}

/// Runs a detached machine to its end, in the background.
fn keep(args: &Args, settings: &Settings, id: String, began: Instant) -> ExitCode {
    let kept = (|| {
        detached::settle()?;
        let mut start = Start::prepare(args, settings, id, began)?;
        let (output, theirs) = io::pipe().map_err(CliError::io)?;
        start.spec.stdio = Stdio { stdin: None, stdout: Some(theirs.into()), stderr: None };
        let log = File::from(std::os::fd::OwnedFd::from(output));
        let written = detached::log(log, start.instance.console()).map_err(CliError::io)?;
        let (machine, instance, signals) = start.create()?;
        let record = Engine::new(settings.clone()).load(NAMESPACE, machine.id())?;
        let started = || {
            detached::tell(Ok(()));
            Ok(())
        };
        let exit = attend(&machine, settings, signals, Ear::new(), written, started);
        machine.delete()?;
        let exit = exit?;
        if !args.rm {
            let (created, vcpus, memory) = (record.created, record.vcpus, record.memory);
            instance.keep(&Ended { exit: exit.clone(), created, vcpus, memory })?;
        }
        Ok(report(&exit))
    })();
    kept.unwrap_or_else(|err: CliError| {
        detached::tell(Err(&err));
        err.code()
    })
}

/// A machine that only lacks its console.
struct Start {
    engine: Engine,
    reservation: Reservation,
    spec: CreateSpec,
    instance: Instance,
    /// Until the machine's files are open.
    held: Held,
    /// From here on they find something that has to be cleaned up.
    signals: Signals,
}

impl Start {
    fn prepare(args: &Args, settings: &Settings, id: String, began: Instant) -> Result<Self, CliError> {
        let mut passed = Vec::new();
        let mut step = |name: &str| passed.push((name.to_owned(), Instant::now()));
        step("arguments");
        let found = match &args.keeper_layout {
            Some(dir) if !dir.starts_with(images::store_dir(settings)) => {
                images::find(settings, &dir.to_string_lossy(), args.tag.as_deref())?
            }
            _ => images::find(settings, &args.image, args.tag.as_deref())?,
        };
        step("image found");
        let (template, held) = prepare(args, settings, &found)?;
        step("template");
        let layout = std::path::absolute(found.layout.path()).map_err(CliError::io)?;
        let origin = Origin { name: args.image.clone(), layout, image: found.image };
        let mut spec = CreateSpec {
            id,
            namespace: NAMESPACE.into(),
            wishes: Wishes { flag_memory: args.memory, flag_vcpus: args.cpus, ..Wishes::default() },
            extra_kernel_args: args.kernel_args.clone(),
            read_only: args.read_only,
            boot: if args.boot == Boot::Cold { BootChoice::Cold } else { BootChoice::Auto },
            on_incompatible: match args.on_incompatible {
                Incompatible::Refuse => OnIncompatible::Refuse,
                Incompatible::Boot => OnIncompatible::Boot,
            },
            lock_ram: true,
            began: Some(began),
            passed,
            ..CreateSpec::default()
        };
        let engine = Engine::new(settings.clone());
        let signals = Signals::hold().map_err(CliError::io)?;
        // First, so that the VMM's program starts while the machine's files are made.
        let reservation = engine.reserve(&spec).map_err(|err| match err.kind() {
            Kind::AlreadyExists => instance::taken(&spec.id),
            _ => err.into(),
        })?;
        let instance = Instance::make(&settings.paths.state, &spec.id, &origin)?;
        spec.bundle = instantiate(&template, &instance.dir)?;
        spec.passed.push(("instance".to_owned(), Instant::now()));
        Ok(Self { engine, reservation, spec, instance, held, signals })
    }

    fn create(self) -> Result<(Machine, Instance, Signals), CliError> {
        let Self { engine, reservation, spec, instance, held, signals } = self;
        let machine = engine.create_in(reservation, spec)?;
        drop(held);
        Ok((machine, instance, signals))
    }
}

/// The image's template, from the cache or made now, and what keeps it there until it is used.
fn prepare(args: &Args, settings: &Settings, found: &Found) -> Result<(Record, Held), CliError> {
    let cache = cache(settings, args.boot == Boot::Auto)?;
    let held = cache.hold()?;
    if let Some(template) = cache.template(&images::digest(&found.image)?) {
        return Ok((template, held));
    }
    drop(held);
    // What is made must fit beside what is there already.
    prune(settings, &cache);
    let held = cache.hold()?;
    let template = unpack(&cache, found, args.quiet)?;
    Ok((template, held))
}

/// The cache of unpacked images. RAM is left alone if it is not to be resumed.
fn cache(settings: &Settings, resume: bool) -> Result<Cache, CliError> {
    let options = Options {
        launcher: Launcher::new(),
        limits: (&settings.limits).into(),
        max_boot_file: settings.limits.boot_file,
        max_ram: (resume && settings.ram.policy == RamPolicy::Allow).then_some(settings.ram.max_memory),
    };
    Ok(Cache::open(&settings.paths.state.join("cache"), options)?)
}

/// Forgets images that were removed from the store, and with them what they alone have needed.
pub fn forget(settings: &Settings, images: &[Digest]) -> Result<(), CliError> {
    let cache = cache(settings, false)?;
    for image in images {
        cache.forget(image)?;
    }
    prune(settings, &cache);
    Ok(())
}

/// Removes from the cache what was not used for longest and does not fit.
fn prune(settings: &Settings, cache: &Cache) {
    let running: Vec<Record> = Kept::all(&settings.paths.state).iter().filter_map(Kept::bundle).collect();
    if let Err(err) = cache.prune(settings.limits.run_cache, &running) {
        eprintln!("ovm: the cache is not cleared up: {}", CliError::from(err).chain());
    }
}

fn fresh_id() -> String {
    let random = std::hash::RandomState::new().hash_one((std::process::id(), SystemTime::now()));
    format!("vm-{:08x}", random as u32)
}

/// Starts a machine and runs it to its end; only a failure of the start or of this process is an error. `written` ends when
/// everything that the machine wrote is where it belongs.
fn attend(
    machine: &Machine,
    settings: &Settings,
    signals: Signals,
    ear: Ear,
    written: JoinHandle<()>,
    started: impl FnOnce() -> io::Result<()>,
) -> Result<ExitInfo, CliError> {
    let stop_timeout = Duration::from_secs(settings.vm.stop_timeout_seconds.into());
    let result = (|| {
        let ended = ear.tell.clone();
        machine.subscribe(move |event| {
            if let MachineEvent::Exited(exit) = event {
                // Nobody listens any more only once the end was heard.
                let _ = ended.send(Heard::Exit(exit.clone()));
            }
        });
        match machine.start() {
            Ok(()) => (),
            // It has ended before it could answer: how is told as for every other end.
            Err(err) if err.kind() == Kind::NotFound => (),
            Err(err) => return Err(err.into()),
        }
        started().map_err(CliError::io)?;
        // Those that came until now were held back.
        signals.watch(ear.stopper()).map_err(CliError::io)?;
        // What killed runs have left, now that the guest does not wait for it.
        Engine::new(settings.clone()).sweep(NAMESPACE);
        instance::sweep(&settings.paths.state);
        scratch::sweep(&settings.paths.state);
        let exit = wait(machine, &ear.heard, stop_timeout)?;
        // The machine's end of the pipe is closed.
        if written.join().is_err() {
            return Err(CliError::io(io::Error::other("the console's output cannot be written")));
        }
        Ok(exit)
    })();
    if result.is_err() && machine.kill().is_ok() {
        let _ = machine.wait();
    }
    result
}

enum Heard {
    /// Somebody wants the machine to end.
    Stop,
    Exit(ExitInfo),
}

/// Hears of the machine's end, and of who wants it.
struct Ear {
    tell: Sender<Heard>,
    heard: Receiver<Heard>,
}

impl Ear {
    fn new() -> Self {
        let (tell, heard) = mpsc::channel();
        Self { tell, heard }
    }

    /// What somebody who wants the machine to end calls.
    fn stopper(&self) -> impl Fn() + Send + 'static {
        let tell = self.tell.clone();
        move || {
            let _ = tell.send(Heard::Stop);
        }
    }
}

/// Waits for the end; the first wish to stop presses the power button, the second one or the timeout kills.
fn wait(machine: &Machine, heard: &Receiver<Heard>, stop_timeout: Duration) -> Result<ExitInfo, CliError> {
    let mut deadline: Option<Instant> = None;
    loop {
        let next = match deadline {
            None => heard.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(at) => heard.recv_timeout(at.saturating_duration_since(Instant::now())),
        };
        match next {
            Ok(Heard::Exit(exit)) => return Ok(exit),
            Ok(Heard::Stop) if deadline.is_none() => {
                deadline = Some(Instant::now() + stop_timeout);
                // A guest that is gone meanwhile says so next.
                let _ = machine.power_button();
            }
            Ok(Heard::Stop) | Err(RecvTimeoutError::Timeout) => {
                let _ = machine.kill();
                return Ok(machine.wait());
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(machine.wait()),
        }
    }
}

/// Says what a status alone does not, and gives the status.
fn report(exit: &ExitInfo) -> ExitCode {
    match &exit.reason {
        ExitReason::Fault { message } => eprintln!("ovm: the machine was ended by a fault: {message}"),
        ExitReason::TripleFault => eprintln!("ovm: the guest shut its processor down by a triple fault"),
        ExitReason::Panic => eprintln!("ovm: the guest's kernel panicked"),
        ExitReason::Killed if exit.oom_killed => {
            eprintln!(
                "ovm: the machine used more memory than its cgroup allows and was killed (vm.overhead in ovms.toml)"
            );
        }
        ExitReason::PowerOff | ExitReason::Reset | ExitReason::Killed => (),
    }
    ExitCode::from(u8::try_from(exit.status).unwrap_or(u8::MAX))
}

fn unpack(cache: &Cache, found: &Found, quiet: bool) -> Result<Record, CliError> {
    let steps = Steps::new(quiet || !io::stderr().is_terminal());
    Ok(steps.following(|tell| cache.unpack(&found.layout, &found.image, tell))?)
}

fn start_log() {
    let filter = std::env::var(LOG_ENV).ok().and_then(|text| text.parse::<Targets>().ok());
    if let Some(filter) = filter {
        tracing_subscriber::registry().with(fmt::layer().with_writer(io::stderr)).with(filter).init();
    }
}
