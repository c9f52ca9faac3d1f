//! `ovm run`: boots an image from an OCI layout, attached to its console, without any daemon.
//!
//! ```text
//!  layout ──Cache──> template ──instantiate──> <state>/run/<name>/ ──Engine──> machine
//!                                                                     │  console = stdin, stdout (by two pipes)
//!  SIGTERM, SIGINT, SIGHUP, Ctrl-] ──> power button, after a while or a second time: kill
//!  exit status of the guest ──────────────────────────────────────────┘
//! ```

use std::fs::{self, File};
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use clap::Parser;
use ovms_artifact::layout::Progress as _;
use ovms_bundle::unpack::{instantiate, Cache, Options, Step};
use ovms_bundle::worker::Launcher;
use ovms_config::size::parse_size;
use ovms_config::Settings;
use ovms_engine::{CreateSpec, Engine, ExitInfo, ExitReason, Kind, Machine, MachineEvent, Stdio, Wishes};

use crate::error::CliError;
use crate::progress::Steps;
use crate::terminal::{self, Console, RawMode, Signals};

/// Machines of `ovm run` have a namespace of their own beside containerd's.
const NAMESPACE: &str = "ovm";
/// A file in each instance's directory, locked as long as its `ovm run` lives.
const LOCK: &str = "lock";
/// Environment variable that names what is logged to stderr: `warn`, `debug`, `ovms_engine=trace`, …
const LOG_ENV: &str = "OVMS_LOG";

/// What `ovm run` takes.
#[derive(Parser)]
#[command(
    after_help = "The console is this terminal: every key goes to the guest but Ctrl-], which presses the power \
    button, and, typed again, ends the machine at once. SIGTERM, SIGINT and SIGHUP do the same; after \
    vm.stop_timeout_seconds of ovms.toml (30) the machine is ended by force.\n\n\
    What the guest writes to its disk is gone when it ends. Its exit status is that of `ovm run`: 0 power-off or reset, \
    134 kernel panic, 137 killed, 139 triple fault or a fault of the machine.\n\n\
    Example:\n  ovm run debian.tar --memory 1G --cpus 2"
)]
pub struct Args {
    /// An OCI layout: a directory or a tar
    #[arg(value_name = "LAYOUT")]
    layout: PathBuf,
    /// Which image of the layout, if it holds several
    #[arg(short, long, value_name = "NAME")]
    tag: Option<String>,
    /// The machine's memory; by default the image's, then ovms.toml's
    #[arg(short, long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    /// The number of vCPUs; by default the image's, then ovms.toml's
    #[arg(short, long, value_name = "N")]
    cpus: Option<u32>,
    /// The machine's name; by default one of its own
    #[arg(short, long)]
    name: Option<String>,
    /// Appended to the image's kernel command line
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    kernel_args: Option<String>,
    /// The guest may not write to its disk
    #[arg(long)]
    read_only: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

/// Runs the verb; the exit code is the guest's.
pub fn run(args: Args) -> Result<ExitCode, CliError> {
    start_log();
    if !terminal::is_root() {
        return Err(CliError::not_permitted(
            "ovm run makes namespaces, cgroups and user ids for the machine: run it as root (sudo ovm run ...)",
        ));
    }
    let settings = Settings::load().map_err(CliError::invalid)?;
    let engine = Engine::new(settings.clone());
    engine.sweep(NAMESPACE);
    let name = args.name.clone().unwrap_or_else(|| format!("run-{}", std::process::id()));
    let template = unpack(&args, &settings)?;
    let instance = Instance::make(&settings.paths.state, &name)?;
    let bundle = instantiate(&template, &instance.dir)?;
    let signals = Signals::hold().map_err(CliError::io)?;
    let (console, input, output) = Console::open().map_err(CliError::io)?;
    let machine = engine.create(CreateSpec {
        id: name.clone(),
        namespace: NAMESPACE.into(),
        bundle,
        wishes: Wishes { flag_memory: args.memory, flag_vcpus: args.cpus, ..Wishes::default() },
        extra_kernel_args: args.kernel_args.clone(),
        read_only: args.read_only,
        stdio: Stdio { stdin: Some(input), stdout: Some(output), stderr: None },
        ..CreateSpec::default()
    })?;
    let stop_timeout = Duration::from_secs(settings.vm.stop_timeout_seconds.into());
    let exit = attend(&machine, console, signals, stop_timeout);
    machine.delete()?;
    exit.map(|exit| report(&exit))
}

/// Runs a machine to its end; only a failure of the terminal or of the start is an error.
fn attend(machine: &Machine, console: Console, signals: Signals, stop_timeout: Duration) -> Result<ExitInfo, CliError> {
    let (tell, heard) = mpsc::channel();
    let result = (|| {
        signals.watch(stopper(&tell)).map_err(CliError::io)?;
        let ended = tell.clone();
        machine.subscribe(move |event| {
            if let MachineEvent::Exited(exit) = event {
                // Nobody listens any more only once the end was heard.
                let _ = ended.send(Heard::Exit(exit.clone()));
            }
        });
        let raw = RawMode::enter().map_err(CliError::io)?;
        let output = console.relay(raw.is_some(), stopper(&tell)).map_err(CliError::io)?;
        match machine.start() {
            Ok(()) => (),
            // It has ended before it could answer: how is told as for every other end.
            Err(err) if err.kind() == Kind::NotFound => (),
            Err(err) => return Err(err.into()),
        }
        let exit = wait(machine, &heard, stop_timeout)?;
        // The machine's end of the pipe is closed, so this comes to its end once everything is written.
        if output.join().is_err() {
            return Err(CliError::io(io::Error::other("the console's output cannot be written")));
        }
        drop(raw);
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

fn stopper(tell: &Sender<Heard>) -> impl Fn() + Send + 'static {
    let tell = tell.clone();
    move || {
        let _ = tell.send(Heard::Stop);
    }
}

/// Waits for the end; the first wish to stop presses the power button, the second one or the timeout kills.
fn wait(machine: &Machine, heard: &mpsc::Receiver<Heard>, stop_timeout: Duration) -> Result<ExitInfo, CliError> {
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

fn unpack(args: &Args, settings: &Settings) -> Result<ovms_bundle::Record, CliError> {
    let options = Options {
        launcher: Launcher::new(),
        limits: (&settings.limits).into(),
        max_boot_file: settings.limits.boot_file,
        max_ram: Some(settings.ram.max_memory),
    };
    let root = settings.paths.state.join("cache");
    private_dir(&root).map_err(CliError::io)?;
    let cache = Cache::open(&root, options)?;
    let steps = Steps::new(args.quiet || !io::stderr().is_terminal());
    let mut shown: Option<(String, u64)> = None;
    let template = cache.unpack_layout(&args.layout, args.tag.as_deref(), &mut |Step { what, done, total }| {
        let (name, before) = shown.take().unwrap_or_default();
        let mut from = before;
        if name != what {
            if !name.is_empty() {
                steps.end();
            }
            steps.begin(&what, total);
            from = 0;
        }
        steps.advance(done.saturating_sub(from));
        shown = Some((what, done));
    });
    steps.end();
    Ok(template?)
}

/// The directory of a machine's own files, removed with it.
struct Instance {
    dir: PathBuf,
    _lock: File,
}

impl Instance {
    fn make(state: &Path, name: &str) -> Result<Self, CliError> {
        let all = state.join("run");
        private_dir(&all).map_err(CliError::io)?;
        Self::sweep(&all);
        let dir = tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(&all).map_err(CliError::io)?;
        let lock = File::create(dir.path().join(LOCK)).map_err(CliError::io)?;
        lock.lock().map_err(CliError::io)?;
        Ok(Self { dir: dir.keep(), _lock: lock })
    }

    /// Removes what killed runs have left.
    fn sweep(all: &Path) {
        for entry in fs::read_dir(all).into_iter().flatten().flatten() {
            let dir = entry.path();
            let stale = File::open(dir.join(LOCK)).is_ok_and(|lock| lock.try_lock().is_ok());
            if stale {
                let _ = fs::remove_dir_all(&dir);
            }
        }
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Err(err) = fs::remove_dir_all(&self.dir) {
            eprintln!("ovm: cannot remove {}: {err}", self.dir.display());
        }
    }
}

fn private_dir(dir: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn start_log() {
    if let Ok(filter) = tracing_subscriber::EnvFilter::try_from_env(LOG_ENV) {
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).init();
    }
}
