//! `ovm ps`: every machine of this host. `ovm logs`: what a detached one has written.

use std::fs::File;
use std::io;
use std::time::SystemTime;

use clap::Parser;
use ovms_config::Settings;
use serde_json::{json, Value};
use time::format_description::well_known::Rfc3339;
use time::OffsetDateTime;

use crate::error::CliError;
use crate::machines::{self, Machine};
use crate::text;

/// What `ovm ps` takes.
#[derive(Parser)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Lists the machines.
pub fn run(args: &Args) -> Result<(), CliError> {
    let settings = Settings::load().map_err(CliError::invalid)?;
    let all = machines::all(&settings);
    if args.json {
        let rows: Vec<Value> = all.iter().map(row).collect();
        return text::print(&(serde_json::to_string_pretty(&rows).map_err(CliError::invalid)? + "\n"));
    }
    let mut table = vec![["ID", "NAMESPACE", "STATE", "IMAGE", "VCPUS", "MEMORY", "PID", "CREATED"].map(str::to_owned)];
    table.extend(all.iter().map(|machine| {
        let (vcpus, memory) = machine.size();
        let state = match machine.exit() {
            Some(exit) => format!("{} ({})", machine.state(), exit.status),
            None => machine.state().to_owned(),
        };
        let dash = || "-".to_owned();
        [
            machine.id.clone(),
            machine.namespace.clone(),
            state,
            machine.image().map_or_else(dash, str::to_owned),
            vcpus.to_string(),
            text::size(memory),
            pid(machine).map_or_else(dash, |pid| pid.to_string()),
            machine.created().map_or_else(dash, ago),
        ]
    }));
    text::print(&text::table(&table))
}

fn pid(machine: &Machine) -> Option<u32> {
    let record = machine.record.as_ref().filter(|_| machine.lives())?;
    Some(record.process?.pid)
}

/// A machine as JSON; `ovm inspect` shows more.
pub fn row(machine: &Machine) -> Value {
    let (vcpus, memory) = machine.size();
    let digest = machine.files.as_ref().map(|files| files.origin.image.digest().to_string());
    json!({
        "id": machine.id,
        "namespace": machine.namespace,
        "state": machine.state(),
        "image": machine.image(),
        "imageDigest": digest,
        "vcpus": vcpus,
        "memoryBytes": memory,
        "pid": pid(machine),
        "created": machine.created().map(rfc3339),
        "exit": machine.exit().map(|exit| json!({
            "status": exit.status, "reason": exit.reason, "oomKilled": exit.oom_killed, "at": rfc3339(exit.at),
        })),
    })
}

/// A time as it is written down.
pub fn rfc3339(at: SystemTime) -> Option<String> {
    OffsetDateTime::from(at).format(&Rfc3339).ok()
}

fn ago(at: SystemTime) -> String {
    let seconds = at.elapsed().unwrap_or_default().as_secs();
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7200 => format!("{} min ago", seconds / 60),
        7200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// What `ovm logs` takes.
#[derive(Parser)]
pub struct LogsArgs {
    /// A machine of ovm run -d
    #[arg(value_name = "ID")]
    id: String,
}

/// Prints what a detached machine has written; of very much only the end is kept.
pub fn logs(args: &LogsArgs) -> Result<(), CliError> {
    let settings = Settings::load().map_err(CliError::invalid)?;
    let machine = machines::find(&settings, &args.id)?;
    let files = machine.files.as_ref().ok_or_else(|| {
        CliError::invalid(format!("{} is run by containerd: its output is with its client", machine.name()))
    })?;
    let mut found = false;
    for path in files.console() {
        match File::open(&path) {
            Ok(mut file) => {
                found = true;
                match io::copy(&mut file, &mut io::stdout()) {
                    Err(err) if err.kind() != io::ErrorKind::BrokenPipe => return Err(CliError::io(err)),
                    _ => {}
                }
            }
            Err(err) if err.kind() == io::ErrorKind::NotFound => {}
            Err(err) => return Err(CliError::io(err)),
        }
    }
    match found {
        true => Ok(()),
        false => Err(CliError::invalid(format!("{} is attached to the terminal that started it", machine.name()))),
    }
}
