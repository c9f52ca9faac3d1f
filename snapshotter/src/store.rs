//! What the daemon knows: one record for each snapshot in an embedded transactional store (redb).
//!
//! ```text
//!            create                    commit(name)                 remove
//!  (nothing) ──────> active or view ──────────────> committed ──────────────> (nothing)
//!                         │  remove                     ^ parent of active, view and committed ones
//!                         └─────────> (nothing)
//! ```
//! Keys and names are containerd's `<namespace>/<sequence>/<key>` and mean nothing here. Every snapshot has a number,
//! which names its directory ([`crate::layout`]); numbers are never used twice, so a directory left behind by a crash
//! can never be taken for a later snapshot's. Every call is one short transaction; callers are on a blocking thread.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Kind as ErrorKind, Result};

/// key or name → [`Record`] as JSON.
const SNAPSHOTS: TableDefinition<&str, &[u8]> = TableDefinition::new("snapshots");
/// number → key or name.
const NUMBERS: TableDefinition<u64, &str> = TableDefinition::new("numbers");
/// (number of the parent, number of the child).
const CHILDREN: TableDefinition<(u64, u64), ()> = TableDefinition::new("children");
/// (what is needed, number of a snapshot that needs it). A blob is named by its digest, everything else by a prefix of its
/// own and the digest (`crate::machine::ram`).
const BLOBS: TableDefinition<(&str, u64), ()> = TableDefinition::new("blobs");
/// Counters by name.
const COUNTERS: TableDefinition<&str, u64> = TableDefinition::new("counters");

/// Pages that redb may keep in memory, in bytes: the records of some hundred snapshots.
const CACHE: usize = 1 << 20;

/// What a snapshot is to containerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Read-only and never committed.
    View,
    /// Writable.
    Active,
    /// Immutable; may be a parent.
    Committed,
}

/// What a snapshot holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Content {
    /// Files of an ordinary image.
    Files,
    /// A piece of an OVMS image, or a container of one.
    Machine(Layer),
}

/// What a machine's snapshot holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// Nothing of its own yet: a fresh child of an OVMS snapshot.
    Empty,
    /// Files that another differ wrote, to be turned into block-stack form.
    Unpacked,
    /// A layer in block-stack form, or a descriptor.
    Ready,
    /// It could not be turned into one; the sentence says why.
    Failed(String),
}

/// Disk space of one snapshot, without its parents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// Seconds and nanoseconds since 1970.
pub type Time = (i64, i32);

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Names its directory.
    pub number: u64,
    /// What it is to containerd.
    pub kind: Kind,
    /// Name of its parent, empty without one.
    pub parent: String,
    /// The labels that containerd gave.
    pub labels: BTreeMap<String, String>,
    /// When it was created, or committed.
    pub created: Time,
    /// When its labels last changed.
    pub updated: Time,
    /// What it holds.
    pub content: Content,
    /// Its usage, once it is known for good.
    pub usage: Option<Usage>,
}

/// A snapshot and the chain below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Key or name of the snapshot.
    pub key: String,
    /// The snapshot.
    pub record: Record,
    /// Its parent, the parent's parent and so on.
    pub parents: Vec<Record>,
}

/// What to create.
#[derive(Clone, Debug)]
pub struct NewSnapshot {
    /// [`Kind::Active`] or [`Kind::View`].
    pub kind: Kind,
    /// Its key.
    pub key: String,
    /// Name of a committed snapshot, or empty.
    pub parent: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

/// The store.
#[derive(Debug)]
pub struct Store {
    db: Database,
}

impl Store {
    /// Opens or creates the store at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let db = Database::builder()
            .set_cache_size(CACHE)
            .create(path)
            .context(|| format!("cannot open the metadata store {}", path.display()))?;
        let store = Self { db };
        store.write(|tables| {
            tables.counters.get("number")?;
            Ok(())
        })?;
        Ok(store)
    }

    /// Adds an active snapshot or a view. `make` makes its directory before the transaction is committed: after a
    /// crash there may be a directory without a record, never a record without a directory.
    pub fn create(&self, new: &NewSnapshot, make: impl FnOnce(&Chain) -> Result<()>) -> Result<Chain> {
        self.write(|tables| {
            if tables.find(&new.key)?.is_some() {
                return Err(Error::new(ErrorKind::AlreadyExists, format!("snapshot {} already exists", new.key)));
            }
            let mut content = Content::Files;
            let mut parents = Vec::new();
            if !new.parent.is_empty() {
                parents = tables.ancestors(&new.parent)?;
                let parent = tables.get(&new.parent)?;
                if parent.kind != Kind::Committed {
                    return Err(Error::invalid(format!("parent {} is not a committed snapshot", new.parent)));
                }
                if parent.content != Content::Files {
                    content = Content::Machine(Layer::Empty);
                }
            }
            let number = tables.next_number()?;
            let now = now();
            let record = Record {
                number,
                kind: new.kind,
                parent: new.parent.clone(),
                labels: new.labels.clone(),
                created: now,
                updated: now,
                content,
                usage: None,
            };
            tables.put(&new.key, &record)?;
            tables.numbers.insert(number, new.key.as_str())?;
            if let Some(parent) = parents.first() {
                tables.children.insert((parent.number, number), ())?;
            }
            let chain = Chain { key: new.key.clone(), record, parents };
            make(&chain)?;
            Ok(chain)
        })
    }

    /// Renames an active snapshot to its committed name. `change` may look at its directory and change what is
    /// recorded beside containerd's own fields; it must be quick.
    pub fn commit(
        &self,
        key: &str,
        name: &str,
        parent: &str,
        labels: BTreeMap<String, String>,
        change: impl FnOnce(&mut Record, Option<&Record>) -> Result<()>,
    ) -> Result<Record> {
        self.write(|tables| {
            if tables.find(name)?.is_some() {
                return Err(Error::new(ErrorKind::AlreadyExists, format!("committed snapshot {name} already exists")));
            }
            let mut record = tables.get(key)?;
            if record.kind != Kind::Active {
                return Err(Error::precondition(format!("snapshot {key} is not active")));
            }
            if parent != record.parent && !parent.is_empty() {
                tables.rebase(key, &mut record, parent)?;
            }
            let below = match record.parent.as_str() {
                "" => None,
                name => Some(tables.get(name)?),
            };
            record.kind = Kind::Committed;
            record.labels = labels;
            record.created = now();
            record.updated = record.created;
            change(&mut record, below.as_ref())?;
            tables.snapshots.remove(key)?;
            tables.put(name, &record)?;
            tables.numbers.insert(record.number, name)?;
            Ok(record)
        })
    }

    /// Forgets a snapshot without children and returns its record.
    pub fn remove(&self, key: &str) -> Result<Record> {
        self.write(|tables| {
            let record = tables.get(key)?;
            if tables.children.range((record.number, 0)..=(record.number, u64::MAX))?.next().is_some() {
                return Err(Error::precondition(format!("cannot remove snapshot {key}: it has children")));
            }
            if !record.parent.is_empty() {
                let parent = tables.get(&record.parent)?;
                tables.children.remove((parent.number, record.number))?;
            }
            tables.snapshots.remove(key)?;
            tables.numbers.remove(record.number)?;
            tables.blobs.retain(|(_, number), ()| number != record.number)?;
            Ok(record)
        })
    }

    /// Replaces labels: all of them without a mask, or those that it names (`labels`, `labels.<key>`). A label whose
    /// new value is empty goes.
    pub fn update(&self, key: &str, labels: &BTreeMap<String, String>, mask: &[String]) -> Result<Record> {
        self.write(|tables| {
            let mut record = tables.get(key)?;
            if mask.is_empty() {
                record.labels = labels.clone();
            }
            for path in mask {
                if let Some(label) = path.strip_prefix("labels.") {
                    match labels.get(label) {
                        Some(value) if !value.is_empty() => record.labels.insert(label.into(), value.clone()),
                        _ => record.labels.remove(label),
                    };
                } else if path == "labels" {
                    record.labels = labels.clone();
                } else {
                    return Err(Error::invalid(format!("field {path} of snapshot {key} cannot be changed")));
                }
            }
            record.labels.retain(|_, value| !value.is_empty());
            record.updated = now();
            tables.put(key, &record)?;
            Ok(record)
        })
    }

    /// Changes what is recorded beside containerd's fields; `None` if the snapshot is gone.
    pub fn amend(&self, number: u64, change: impl FnOnce(&mut Record)) -> Result<Option<Record>> {
        self.write(|tables| {
            let Some(key) = tables.numbers.get(number)?.map(|key| key.value().to_owned()) else { return Ok(None) };
            let mut record = tables.get(&key)?;
            change(&mut record);
            tables.put(&key, &record)?;
            Ok(Some(record))
        })
    }

    /// Records that these snapshots need these blobs.
    pub fn hold_blobs(&self, digests: &[String], numbers: &[u64]) -> Result<()> {
        self.write(|tables| {
            for number in numbers {
                if tables.numbers.get(number)?.is_none() {
                    return Err(Error::not_found(format!("snapshot {number} is gone")));
                }
                for digest in digests {
                    tables.blobs.insert((digest.as_str(), *number), ())?;
                }
            }
            Ok(())
        })
    }

    /// Records that a snapshot needs these blobs no longer.
    pub fn let_go(&self, digests: &[String], number: u64) -> Result<()> {
        self.write(|tables| {
            for digest in digests {
                tables.blobs.remove((digest.as_str(), number))?;
            }
            Ok(())
        })
    }

    /// The names of all blobs that snapshots need.
    pub fn held(&self) -> Result<BTreeSet<String>> {
        self.read(|tables| tables.blobs.iter()?.map(|entry| Ok(entry?.0.value().0.to_owned())).collect())
    }

    /// Whether snapshots stand on this one.
    pub fn has_children(&self, number: u64) -> Result<bool> {
        self.read(|tables| Ok(tables.children.range((number, 0)..=(number, u64::MAX))?.next().is_some()))
    }

    /// One snapshot.
    pub fn get(&self, key: &str) -> Result<Record> {
        self.read(|tables| tables.get(key))
    }

    /// One snapshot and what lies below it.
    pub fn chain(&self, key: &str) -> Result<Chain> {
        self.read(|tables| {
            let record = tables.get(key)?;
            let parents = if record.parent.is_empty() { Vec::new() } else { tables.ancestors(&record.parent)? };
            Ok(Chain { key: key.into(), record, parents })
        })
    }

    /// The snapshot with this number, and what lies below it.
    pub fn chain_of(&self, number: u64) -> Result<Option<Chain>> {
        let key = self.read(|tables| Ok(tables.numbers.get(number)?.map(|key| key.value().to_owned())))?;
        key.map(|key| self.chain(&key)).transpose()
    }

    /// All snapshots in the order of their keys.
    pub fn list(&self) -> Result<Vec<(String, Record)>> {
        self.read(|tables| {
            tables
                .snapshots
                .iter()?
                .map(|entry| {
                    let (key, value) = entry?;
                    Ok((key.value().to_owned(), decode(key.value(), value.value())?))
                })
                .collect()
        })
    }

    /// Calls `work` with a test for known snapshot numbers and one for needed blobs, while no snapshot can be created
    /// or removed.
    pub fn with_known<T>(
        &self,
        work: impl FnOnce(&dyn Fn(u64) -> bool, &dyn Fn(&str) -> bool) -> Result<T>,
    ) -> Result<T> {
        self.write(|tables| {
            // A table that cannot be read must not make anything look unknown.
            let known = |number| !matches!(tables.numbers.get(number), Ok(None));
            let needed = |digest: &str| {
                !matches!(tables.blobs.range((digest, 0)..=(digest, u64::MAX)).map(|mut r| r.next()), Ok(None))
            };
            work(&known, &needed)
        })
    }

    fn write<T>(&self, work: impl FnOnce(&mut WriteTables<'_>) -> Result<T>) -> Result<T> {
        let failed = || "the metadata store failed";
        let transaction = self.db.begin_write().context(failed)?;
        let result = {
            let mut tables = Tables {
                snapshots: transaction.open_table(SNAPSHOTS).context(failed)?,
                numbers: transaction.open_table(NUMBERS).context(failed)?,
                children: transaction.open_table(CHILDREN).context(failed)?,
                blobs: transaction.open_table(BLOBS).context(failed)?,
                counters: transaction.open_table(COUNTERS).context(failed)?,
            };
            work(&mut tables)?
        };
        transaction.commit().context(failed)?;
        Ok(result)
    }

    fn read<T>(&self, work: impl FnOnce(&ReadTables) -> Result<T>) -> Result<T> {
        let failed = || "the metadata store failed";
        let transaction = self.db.begin_read().context(failed)?;
        work(&Tables {
            snapshots: transaction.open_table(SNAPSHOTS).context(failed)?,
            numbers: transaction.open_table(NUMBERS).context(failed)?,
            children: transaction.open_table(CHILDREN).context(failed)?,
            blobs: transaction.open_table(BLOBS).context(failed)?,
            counters: transaction.open_table(COUNTERS).context(failed)?,
        })
    }
}

struct Tables<S, N, C, B, M> {
    snapshots: S,
    numbers: N,
    children: C,
    blobs: B,
    counters: M,
}

type WriteTables<'t> = Tables<
    redb::Table<'t, &'static str, &'static [u8]>,
    redb::Table<'t, u64, &'static str>,
    redb::Table<'t, (u64, u64), ()>,
    redb::Table<'t, (&'static str, u64), ()>,
    redb::Table<'t, &'static str, u64>,
>;

type ReadTables = Tables<
    redb::ReadOnlyTable<&'static str, &'static [u8]>,
    redb::ReadOnlyTable<u64, &'static str>,
    redb::ReadOnlyTable<(u64, u64), ()>,
    redb::ReadOnlyTable<(&'static str, u64), ()>,
    redb::ReadOnlyTable<&'static str, u64>,
>;

impl<S: ReadableTable<&'static str, &'static [u8]>, N, C, B, M> Tables<S, N, C, B, M> {
    fn find(&self, key: &str) -> Result<Option<Record>> {
        self.snapshots.get(key)?.map(|value| decode(key, value.value())).transpose()
    }

    fn get(&self, key: &str) -> Result<Record> {
        self.find(key)?.ok_or_else(|| Error::not_found(format!("snapshot {key} does not exist")))
    }

    /// The snapshot called `name` and everything below it.
    fn ancestors(&self, name: &str) -> Result<Vec<Record>> {
        let mut all = vec![self.get(name)?];
        while let Some(name) = all.last().map(|record| record.parent.clone()).filter(|name| !name.is_empty()) {
            all.push(self.get(&name)?);
        }
        Ok(all)
    }
}

impl WriteTables<'_> {
    fn put(&mut self, key: &str, record: &Record) -> Result<()> {
        let value = serde_json::to_vec(record).context(|| "a snapshot cannot be written as JSON")?;
        self.snapshots.insert(key, value.as_slice())?;
        Ok(())
    }

    fn next_number(&mut self) -> Result<u64> {
        let next = self.counters.get("number")?.map_or(1, |last| last.value() + 1);
        self.counters.insert("number", next)?;
        Ok(next)
    }

    /// Gives a parentless snapshot of files its parent, as containerd's parallel unpacking asks at Commit.
    fn rebase(&mut self, key: &str, record: &mut Record, parent: &str) -> Result<()> {
        if !record.parent.is_empty() {
            return Err(Error::invalid(format!("the parent of snapshot {key} cannot be changed by a commit")));
        }
        let below = self.get(parent)?;
        if below.kind != Kind::Committed {
            return Err(Error::precondition(format!("parent {parent} is not a committed snapshot")));
        }
        if below.content != Content::Files || record.content != Content::Files {
            return Err(Error::invalid(format!("snapshot {key} belongs to a machine and keeps its parent")));
        }
        self.children.insert((below.number, record.number), ())?;
        record.parent = parent.into();
        Ok(())
    }
}

impl From<redb::StorageError> for Error {
    fn from(source: redb::StorageError) -> Self {
        Error::internal("the metadata store failed").because(source)
    }
}

fn decode(key: &str, value: &[u8]) -> Result<Record> {
    serde_json::from_slice(value).context(|| format!("the record of snapshot {key} is damaged"))
}

fn now() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (i64::try_from(since.as_secs()).unwrap_or(i64::MAX), i32::try_from(since.subsec_nanos()).unwrap_or_default())
}

#[cfg(test)]
mod tests;
