//! JSON as it goes into blobs: the same value always gives the same bytes.
//!
//! The OCI types keep annotations in hash maps, whose order changes from run to run; a digest over them would too.

use serde::Serialize;
use serde_json::{Map, Value};

/// Indented JSON with the keys of every object in order, and a final line end.
pub(crate) fn to_bytes<T: Serialize>(value: &T) -> serde_json::Result<Vec<u8>> {
    let sorted = sort(serde_json::to_value(value)?);
    let mut bytes = serde_json::to_vec_pretty(&sorted)?;
    bytes.push(b'\n');
    Ok(bytes)
}

fn sort(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let mut members: Vec<(String, Value)> = map.into_iter().collect();
            members.sort_by(|a, b| a.0.cmp(&b.0));
            Value::Object(members.into_iter().map(|(k, v)| (k, sort(v))).collect::<Map<_, _>>())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(sort).collect()),
        other => other,
    }
}
