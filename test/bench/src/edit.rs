//! Changes what a RAM blob says of the machine, so that every checksum still holds: what a host of another kind, or a
//! forger, would have written. The layout is that of `docs/ram-snapshot.md`.
//!
//! Usage: `ovms-ram-edit BLOB OUT POINTER JSON`: the value at the JSON pointer of the head becomes that one.

use std::error::Error;
use std::fs;

use serde_json::Value;
use twox_hash::{XxHash3_128, XxHash3_64};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [blob, out, pointer, value] = args.as_slice() else {
        return Err("usage: ovms-ram-edit BLOB OUT POINTER JSON".into());
    };
    fs::write(out, edited(fs::read(blob)?, pointer, serde_json::from_str(value)?)?)?;
    Ok(())
}

fn edited(mut blob: Vec<u8>, pointer: &str, value: Value) -> Result<Vec<u8>> {
    let number = |at: usize| -> Result<usize> {
        let bytes = blob.get(at..at + 8).ok_or("the blob is shorter than its prefix")?;
        Ok(usize::try_from(u64::from_le_bytes(bytes.try_into()?))?)
    };
    let offset = number(16)?;
    let mut head: Value = serde_json::from_slice(blob.get(offset..).ok_or("the head is behind the end")?)?;
    *head.pointer_mut(pointer).ok_or("the head has no such field")? = value;
    let head = serde_json::to_vec(&head)?;
    blob.truncate(offset);
    blob.extend_from_slice(&head);
    let length = blob.len() as u64;
    blob[24..32].copy_from_slice(&(head.len() as u64).to_le_bytes());
    blob[32..40].copy_from_slice(&length.to_le_bytes());
    blob[40..56].copy_from_slice(&XxHash3_128::oneshot(&head).to_le_bytes());
    let sum = XxHash3_64::oneshot(&blob[..56]);
    blob[56..64].copy_from_slice(&sum.to_le_bytes());
    Ok(blob)
}
