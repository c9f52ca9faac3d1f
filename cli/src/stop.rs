//! `ovm stop` and `ovm rm`: ends machines, and removes what is left of those of `ovm run -d`.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use ovms_config::Settings;
use ovms_engine::{Engine, Kind, State, ToMachine};

use crate::error::CliError;
use crate::machines::{self, Machine};
use crate::run::NAMESPACE;
use crate::scratch;
use crate::text;

/// How often a waiter looks.
const LOOK: Duration = Duration::from_millis(20);
/// How long a machine that was killed may take to be gone.
const DEATH: Duration = Duration::from_secs(30);

/// What `ovm stop` takes.
#[derive(Parser)]
pub struct Args {
    /// Machines, ID or NAMESPACE/ID
    #[arg(value_name = "ID", required = true)]
    ids: Vec<String>,
    /// Seconds after which a machine that does not end is ended by force; by default ovms.toml's
    #[arg(short, long, value_name = "SECONDS")]
    time: Option<u32>,
}

/// Presses each machine's power button and waits for its end.
pub fn run(args: &Args) -> Result<(), CliError> {
    let settings = Settings::load().map_err(CliError::invalid)?;
    let patience = Duration::from_secs(args.time.unwrap_or(settings.vm.stop_timeout_seconds).into());
    for name in &args.ids {
        let machine = machines::find(&settings, name)?;
        if machine.lives() {
            stop(&settings, &machine, patience)?;
        }
        // Between the machine's record and the word of its end it would be known to nobody.
        machine.files.as_ref().into_iter().for_each(wait_for_keeper);
        text::print(&format!("{name}\n"))?;
    }
    Ok(())
}

/// What `ovm rm` takes.
#[derive(Parser)]
pub struct RemoveArgs {
    /// Machines of ovm run
    #[arg(value_name = "ID", required = true)]
    ids: Vec<String>,
    /// End machines that run, by force
    #[arg(short, long)]
    force: bool,
}

/// Removes what is left of machines.
pub fn remove(args: &RemoveArgs) -> Result<(), CliError> {
    let settings = Settings::load().map_err(CliError::invalid)?;
    scratch::sweep(&settings.paths.state);
    for name in &args.ids {
        let machine = machines::find(&settings, name)?;
        if machine.namespace != NAMESPACE {
            let name = machine.name();
            return Err(CliError::invalid(format!(
                "{name} is run by containerd: remove it with the client that made it"
            )));
        }
        if machine.lives() {
            if !args.force {
                return Err(CliError::not_now(format!("{name} is running: stop it first (ovm stop), or use --force")));
            }
            kill(&settings, &machine)?;
        }
        // One that ended, by us or meanwhile, is kept by its files alone.
        let left = machine.files.as_ref().filter(|files| files.dir.exists());
        if let Some(files) = left {
            wait_for_keeper(files);
            match fs::remove_dir_all(&files.dir) {
                Err(err) if err.kind() != std::io::ErrorKind::NotFound => return Err(CliError::io(err)),
                _ => {}
            }
        }
        text::print(&format!("{name}\n"))?;
    }
    Ok(())
}

/// The keeper writes down how its machine ended as its last act.
fn wait_for_keeper(files: &crate::run::instance::Kept) {
    let deadline = Instant::now() + DEATH;
    while files.is_held() && Instant::now() < deadline {
        thread::sleep(LOOK);
    }
}

/// Presses the power button; ends by force what does not end in time.
fn stop(settings: &Settings, machine: &Machine, patience: Duration) -> Result<(), CliError> {
    let engine = Engine::new(settings.clone());
    match engine.remote(&machine.namespace, &machine.id).and_then(|r| r.request(&ToMachine::PowerButton, &mut |_| ())) {
        Ok(_) => {}
        // It ends of itself, or its engine is gone: then there is nothing to press.
        Err(err) if matches!(err.kind(), Kind::NotFound | Kind::Unavailable) => {}
        Err(err) => return Err(err.into()),
    }
    if gone(&engine, machine, patience) {
        return Ok(());
    }
    kill(settings, machine)
}

/// Ends a machine by force.
pub fn kill(settings: &Settings, machine: &Machine) -> Result<(), CliError> {
    let engine = Engine::new(settings.clone());
    match engine.remote(&machine.namespace, &machine.id).and_then(|r| r.request(&ToMachine::Kill, &mut |_| ())) {
        Ok(_) => {}
        Err(err) if matches!(err.kind(), Kind::NotFound | Kind::Unavailable) => {
            // Nobody looks after it any more. containerd's machines are its own to clean up after.
            if machine.namespace == NAMESPACE {
                engine.sweep(NAMESPACE);
            }
        }
        Err(err) => return Err(err.into()),
    }
    match gone(&engine, machine, DEATH) {
        true => Ok(()),
        false => Err(CliError::io(std::io::Error::other(format!("{} does not end", machine.name())))),
    }
}

/// Waits until the machine has ended.
fn gone(engine: &Engine, machine: &Machine, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        match engine.load(&machine.namespace, &machine.id) {
            Ok(record) if record.state != State::Stopped && Some(record.created) == machine.created() => {}
            _ => return true,
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(LOOK);
    }
}
