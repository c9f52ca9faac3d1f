//! The walk through a spec along the table.

use serde_json::Value;
use tracing::debug;

use super::table::{self, Treatment};
use crate::error::{Error, Kind, Result};

/// Goes through every field that is there. Gives the sentences for the log.
///
/// # Errors
/// [`Kind::Invalid`], naming the first field that is refused.
pub(super) fn check(spec: &Value) -> Result<Vec<String>> {
    let mut walk = Walk { spec, warnings: Vec::new() };
    walk.visit("", spec)?;
    Ok(walk.warnings)
}

struct Walk<'a> {
    spec: &'a Value,
    warnings: Vec<String>,
}

impl Walk<'_> {
    fn visit(&mut self, path: &str, value: &Value) -> Result<()> {
        if is_empty(value) {
            return Ok(());
        }
        if let Some(row) = table::find(path) {
            return self.treat(path, value, row.treatment);
        }
        let Value::Object(members) = value else {
            self.warnings.push(format!("{path} of the container's spec is not known to this version and is ignored"));
            return Ok(());
        };
        for (name, member) in members {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            self.visit(&path, member)?;
        }
        Ok(())
    }

    fn treat(&mut self, path: &str, value: &Value, treatment: Treatment) -> Result<()> {
        match treatment {
            Treatment::Applied => {}
            Treatment::Ignored => debug!(field = path, "ignored"),
            Treatment::Warned(sentence) => self.warnings.extend(sentence(value)),
            Treatment::Refused(reason) => {
                if let Some(reason) = reason(value, self.spec) {
                    return Err(Error::new(Kind::Invalid, format!("{path} of the container's spec: {reason}")));
                }
            }
        }
        Ok(())
    }
}

/// What says nothing need not be treated: Go clients write empty lists, texts and objects for "not given".
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(is) => !is,
        Value::Number(_) => false,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(members) => members.is_empty(),
    }
}
