//! Compiles the system call filters: `filters.rs` in the output directory holds a program for each kind of thread.

use std::env;
use std::error::Error;
use std::fmt::Write;
use std::fs;
use std::path::Path;

#[path = "src/seccomp/compile.rs"]
mod compile;
#[path = "src/seccomp/kind.rs"]
mod kind;
#[allow(dead_code, reason = "the list of ioctls is for tests")]
#[path = "src/seccomp/rules.rs"]
mod rules;

use kind::ThreadKind;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=src/seccomp");
    let mut source = String::from("[\n");
    for kind in ThreadKind::ALL {
        writeln!(source, "    // {kind:?}\n    &[")?;
        for step in compile::compile(rules::of(kind)?)? {
            let (code, jt, jf, k) = (step.code, step.jt, step.jf, step.k);
            writeln!(source, "        sock_filter {{ code: {code:#x}, jt: {jt}, jf: {jf}, k: {k:#x} }},")?;
        }
        writeln!(source, "    ],")?;
    }
    source.push_str("]\n");
    fs::write(Path::new(&env::var("OUT_DIR")?).join("filters.rs"), source)?;
    Ok(())
}
