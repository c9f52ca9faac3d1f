//! Text as people read it: numbers, and output to a pipe that may have been closed.

use std::io::{self, Write};

use ovms_artifact::manifest::Manifest;

use crate::error::CliError;

/// A text that comes from an image must not drive the terminal: control characters become `?`.
pub fn harmless(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// Writes to stdout. Who has read enough (`ovm inspect IMAGE | head`) is no error.
pub fn print(text: &str) -> Result<(), CliError> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => Err(CliError::io(e)),
        _ => Ok(()),
    }
}

/// Warns, on stderr, of what a machine of this manifest would be refused for.
pub fn warn_unsupported(manifest: &Manifest) {
    for problem in manifest.unsupported() {
        eprintln!("ovm: warning: no machine of this image can be started: {}", harmless(&problem.to_string()));
    }
}

/// A size in bytes with the largest binary unit that leaves at least 1 before the point.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let unit = (bytes.ilog2() / 10) as usize;
    let scaled = bytes as f64 / (1u64 << (10 * unit)) as f64;
    format!("{scaled:.1} {}", UNITS[unit - 1])
}

/// Columns as wide as their widest cell, two spaces between.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
    let widths: [usize; N] = std::array::from_fn(width);
    let mut out = String::new();
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{:width$}", harmless(cell)));
        out += cells.collect::<Vec<_>>().join("  ").trim_end();
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_aligns_columns_and_tames_cells() {
        let rows = [["A", "B"], ["long\u{1b}", "x"]].map(|row| row.map(str::to_owned));
        assert_eq!(table(&rows), "A      B\nlong?  x\n");
    }

    #[test]
    fn size_takes_the_largest_unit_that_fits() {
        let shown: Vec<String> = [0, 1023, 1024, 1536, 5 << 30, u64::MAX].map(size).into();
        assert_eq!(shown, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "5.0 GiB", "16.0 EiB"]);
    }
}
