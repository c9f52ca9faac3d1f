//! The units that an operator installs, as systemd itself reads them.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::process::{Command, Output};

/// The exposure at which `systemd-analyze security` begins to speak of more than "OK", in tenths. The daemon works as root on
/// the host's own files, which alone costs about four.
const EXPOSURE: &str = "--threshold=50";

/// The units, copied into a directory of the test's own with `change` made to their text; and their paths.
fn units(test: &str, change: impl Fn(&str) -> String) -> Vec<PathBuf> {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("systemd-{test}"));
    let _none_yet = fs::remove_dir_all(&dir);
    fs::create_dir(&dir).unwrap();
    let from = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/systemd")).unwrap();
    let copy = |path: PathBuf| {
        // systemd looks for the program, which need not be installed here.
        let text = fs::read_to_string(&path).unwrap().replace("/usr/local/bin/ovms-snapshotter", "/bin/true");
        let to = dir.join(path.file_name().unwrap());
        fs::write(&to, change(&text)).unwrap();
        to
    };
    from.map(|entry| copy(entry.unwrap().path())).collect()
}

/// What systemd says, or nothing where it is not installed.
fn analyze(args: &[&str], units: &[PathBuf]) -> Option<Output> {
    let done = Command::new("systemd-analyze").args(args).arg("--no-pager").args(units).output();
    match done {
        Err(err) if err.kind() == ErrorKind::NotFound => {
            eprintln!("SKIPPED: systemd-analyze is not installed (package systemd): the units are not verified");
            None
        }
        done => Some(done.unwrap()),
    }
}

const VERIFY: [&str; 3] = ["verify", "--man=no", "--recursive-errors=no"];

#[test]
fn units_are_accepted_without_a_word() {
    let units = units("verify", str::to_owned);
    assert_eq!(units.len(), 3);
    let Some(done) = analyze(&VERIFY, &units) else { return };
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    // A host's own units may have faults that are none of ours.
    let ours: Vec<_> = said.lines().filter(|line| line.contains("ovms")).collect();
    assert!(done.status.success() && ours.is_empty(), "{said}");
}

#[test]
fn a_misspelt_key_and_an_unknown_service_are_found() {
    let misspelt = units("misspelt", |text| text.replace("NoNewPrivileges", "NoNewPrivilege"));
    let Some(done) = analyze(&VERIFY, &misspelt) else { return };
    assert!(String::from_utf8_lossy(&done.stderr).contains("NoNewPrivilege"), "{done:?}");

    let elsewhere = units("elsewhere", |text| text.replace("Service=ovms-snapshotter", "Service=ovms-other"));
    let done = analyze(&VERIFY, &elsewhere).unwrap();
    assert!(String::from_utf8_lossy(&done.stderr).contains("ovms-other"), "{done:?}");
}

#[test]
fn the_service_is_exposed_no_more_than_its_work_takes() {
    let mut units = units("security", str::to_owned);
    units.retain(|unit| unit.extension().is_some_and(|kind| kind == "service"));
    let Some(done) = analyze(&["security", "--offline=yes", EXPOSURE], &units) else { return };
    assert!(
        done.status.success(),
        "{}{}",
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
}
