//! The working set of a restored machine: what its guest touches first, recorded at one restore and read ahead at the
//! next.
//!
//! ```text
//!   prefetch:  file of an earlier restore ──> MADV_POPULATE_READ, range by range, while the machine is built and runs
//!   record:    machine runs ──1 s, or its end──> /proc/self/pagemap ──> file ──> Mail::WorkingSetRecorded
//! ```
//!
//! A thread of its own does both, beside the run. What was touched is read from the process's own page table: mincore(2)
//! would tell what the page cache holds, for whomever, and KVM's dirty log only what was written. The page table is
//! opened while there is a `/proc`; reading it takes no privilege. The kernel maps up to 16 pages around each one that is
//! read, so a recorded set is larger than what the guest touched, by pages that cost next to nothing to map again.
//!
//! Prefetching only reads: a page that the guest then writes is copied at its write, as without; to copy it ahead would
//! charge every clone for pages that it may leave alone. A recorded file is hostile, since its guest may have taken over
//! the VMM that wrote it: ranges outside of memory are refused with the whole file, and what is read ahead is bounded.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use ovms_state::{PageRange, WorkingSet, MAX_RANGES};

use crate::mailbox::{Mail, Sender};
use crate::memory::Ram;
use crate::report;

/// For how long a machine runs before what it has touched is its working set.
const WINDOW: Duration = Duration::from_secs(1);
/// How long the end of a machine waits for its working set to be written.
const PATIENCE: Duration = Duration::from_millis(200);
/// Most pages that are read ahead: 256 MiB, more than a guest touches in its first second.
const MAX_PREFETCH: u64 = 64 << 10;
/// Pages that one call reads ahead at most: the address space is locked against new mappings meanwhile.
const STEP: u64 = 512;
/// Bytes of stack.
const STACK_BYTES: usize = 128 << 10;
const PAGE: u64 = 4096;
/// Bytes of one entry of a page map.
const ENTRY: u64 = 8;
/// Bytes of the page map that are read at once.
const BUFFER: usize = 64 << 10;
/// The page is in RAM, or in swap space (Documentation/admin-guide/mm/pagemap.rst).
const TOUCHED: u64 = 1 << 63 | 1 << 62;

/// What is to be done at this restore.
#[derive(Debug, Default)]
pub struct Plan {
    /// The working set that is read ahead.
    pub prefetch: Option<File>,
    /// The process's page map, and the file that takes what it shows.
    pub record: Option<(File, File)>,
}

impl Plan {
    /// Starts the thread, if there is anything to do. `enter` runs on it first.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(self, ram: Ram, mail: Sender, enter: Arc<dyn Fn() + Send + Sync>) -> io::Result<Option<Watch>> {
        if self.prefetch.is_none() && self.record.is_none() {
            return Ok(None);
        }
        let control = Arc::new(Control::default());
        let own = Arc::clone(&control);
        Builder::new().name("working-set".into()).stack_size(STACK_BYTES).spawn(move || {
            enter();
            self.run(&ram, &mail, &own);
            own.set(|state| state.done = true);
        })?;
        Ok(Some(Watch(control)))
    }

    fn run(self, ram: &Ram, mail: &Sender, control: &Control) {
        if let Some(file) = self.prefetch {
            match WorkingSet::read(&file, ram.size()) {
                Ok(set) => prefetch(ram, &set, || control.lock().ended),
                Err(err) => tracing::warn!("nothing is read ahead: {}", report::chain(&err)),
            }
        }
        let Some((map, file)) = self.record else { return };
        control.wait_for_window();
        match record(ram, &map, &file) {
            Ok(pages) => {
                tracing::debug!(pages, "the working set is recorded");
                mail.send(Mail::WorkingSetRecorded);
            }
            Err(err) => tracing::warn!("the working set is not recorded: {}", report::chain(&err)),
        }
    }
}

#[derive(Default)]
struct State {
    /// When the guest began to run.
    since: Option<Instant>,
    /// The guest does not run any more.
    ended: bool,
    done: bool,
}

#[derive(Default)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    /// Waits until the guest has run for [`WINDOW`] or has ended.
    fn wait_for_window(&self) {
        let mut state = self.lock();
        while !state.ended {
            let left = state.since.map(|since| WINDOW.saturating_sub(since.elapsed()));
            if left.is_some_and(|left| left.is_zero()) {
                return;
            }
            let wait = left.unwrap_or(Duration::MAX);
            state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The thread, as the machine sees it.
pub struct Watch(Arc<Control>);

impl Watch {
    /// The guest runs.
    pub fn began(&self) {
        if self.0.lock().since.is_none() {
            self.0.set(|state| state.since = Some(Instant::now()));
        }
    }

    /// The guest stands for a while: what it has touched so far is its working set. Does not wait.
    pub fn stopped(&self) {
        self.0.set(|state| state.ended = true);
    }

    /// The guest has ended: waits, not for long, until its working set is written.
    pub fn finish(&self) {
        self.stopped();
        let until = Instant::now() + PATIENCE;
        let mut state = self.0.lock();
        while !state.done {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Maps the pages of `set`, and reads from disk what the page cache lacks, until `stop`.
fn prefetch(ram: &Ram, set: &WorkingSet, stop: impl Fn() -> bool) {
    let mut left = MAX_PREFETCH;
    for range in &set.ranges {
        let mut at = range.first;
        let end = range.first.saturating_add(range.count.min(left));
        left = left.saturating_sub(range.count);
        while at < end {
            if stop() {
                return;
            }
            let count = STEP.min(end.saturating_sub(at));
            ram.read_ahead(at.saturating_mul(PAGE), count.saturating_mul(PAGE));
            at = at.saturating_add(count);
        }
    }
}

/// Writes what the page map `map` shows of `ram` to `file`; returns the number of pages.
fn record(ram: &Ram, map: &File, file: &File) -> io::Result<u64> {
    let mut set = WorkingSet::default();
    let mut buffer = vec![0u8; BUFFER];
    for (first, start, pages) in ram.host_pages() {
        let mut at = 0;
        while at < pages {
            let want = usize::try_from((pages - at).saturating_mul(ENTRY)).unwrap_or(BUFFER).min(BUFFER);
            let part = buffer.get_mut(..want).unwrap_or_default();
            map.read_exact_at(part, (start + at) * ENTRY)?;
            let entries = part.as_chunks::<{ ENTRY as usize }>().0;
            for (page, _) in (first + at..).zip(entries).filter(|(_, entry)| u64::from_ne_bytes(**entry) & TOUCHED != 0)
            {
                add(&mut set, page);
            }
            at += want as u64 / ENTRY;
        }
    }
    file.write_all_at(&set.encode(), 0)?;
    Ok(set.pages())
}

/// Adds a page behind all others; beyond [`MAX_RANGES`] ranges it is left out.
fn add(set: &mut WorkingSet, page: u64) {
    let full = set.ranges.len() == MAX_RANGES;
    match set.ranges.last_mut() {
        Some(last) if last.first + last.count == page => last.count += 1,
        _ if full => {}
        _ => set.ranges.push(PageRange { first: page, count: 1 }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mailbox::Mailbox;
    use std::os::fd::AsRawFd;
    use vm_memory::{Bytes, GuestAddress};

    /// Memory of 4 MiB beyond the hole, with a file behind it.
    fn ram() -> (Ram, File) {
        let size = (3 << 30) + (4 << 20);
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        (Ram::restore(&file, size, false).unwrap(), file)
    }

    fn touched(ram: &Ram) -> WorkingSet {
        let file = tempfile::tempfile().unwrap();
        record(ram, &File::open("/proc/self/pagemap").unwrap(), &file).unwrap();
        WorkingSet::read(&file, ram.size()).unwrap()
    }

    #[test]
    fn record_names_what_was_touched_on_both_sides_of_the_hole() {
        let (ram, _file) = ram();
        assert!(touched(&ram).ranges.is_empty());
        for address in [0x5000, 4 << 30] {
            ram.memory().write_obj(1u8, GuestAddress(address)).unwrap();
        }
        let set = touched(&ram);
        let holds = |page| set.ranges.iter().any(|range| (range.first..range.first + range.count).contains(&page));
        assert!(holds(5) && holds((3 << 30) / PAGE), "{set:?}");
        assert!(!holds(1000));
    }

    #[test]
    fn add_joins_neighbours_and_leaves_out_what_is_too_much() {
        let mut set = WorkingSet::default();
        (0..MAX_RANGES as u64 + 5).flat_map(|n| [4 * n, 4 * n + 1]).for_each(|page| add(&mut set, page));
        assert_eq!((set.ranges.len(), set.pages()), (MAX_RANGES, 2 * MAX_RANGES as u64));
        assert_eq!(set.ranges[1], PageRange { first: 4, count: 2 });
    }

    #[test]
    fn prefetch_maps_the_ranges_and_no_more_than_the_bound() {
        let (ram, _file) = ram();
        let high = (3 << 30) / PAGE;
        let ranges = [(64, 32), (high, 16)].map(|(first, count)| PageRange { first, count }).to_vec();
        prefetch(&ram, &WorkingSet { ranges }, || false);
        let set = touched(&ram);
        assert_eq!(set.pages(), 48, "{set:?}");
        let (ram, _file) = self::ram();
        let all = WorkingSet { ranges: vec![PageRange { first: 0, count: high }] };
        prefetch(&ram, &all, || false);
        // A host that is short of memory takes some of them back at once.
        let pages = touched(&ram).pages();
        assert!((MAX_PREFETCH / 2..=MAX_PREFETCH).contains(&pages), "{pages}");
    }

    #[test]
    fn machine_that_ends_early_is_recorded_at_its_end() {
        let (ram, _memory) = ram();
        ram.memory().write_obj(1u8, GuestAddress(0x5000)).unwrap();
        let file = tempfile::tempfile().unwrap();
        let (mail, mailbox) = Mailbox::new().unwrap();
        let map = File::open("/proc/self/pagemap").unwrap();
        let plan = Plan { prefetch: None, record: Some((map, file.try_clone().unwrap())) };
        let watch = plan.start(ram.clone(), mail, Arc::new(|| ())).unwrap().unwrap();
        watch.began();
        watch.finish();
        // A host that is busier than the patience of an end.
        while !watch.0.lock().done {
            std::thread::yield_now();
        }
        assert_eq!(mailbox.take(), [Mail::WorkingSetRecorded]);
        assert_eq!(WorkingSet::read(&file, ram.size()).unwrap().ranges[0].first, 5);
    }

    #[test]
    fn foreign_file_prefetches_nothing() {
        let (ram, _memory) = ram();
        let file = tempfile::tempfile().unwrap();
        let set = WorkingSet { ranges: vec![PageRange { first: 0, count: ram.size() / PAGE + 1 }] };
        file.write_all_at(&set.encode(), 0).unwrap();
        let (mail, mailbox) = Mailbox::new().unwrap();
        let plan = Plan { prefetch: Some(file), record: None };
        let watch = plan.start(ram.clone(), mail, Arc::new(|| ())).unwrap().unwrap();
        watch.finish();
        assert!(touched(&ram).ranges.is_empty());
        assert!(mailbox.take().is_empty() && mailbox.as_raw_fd() >= 0);
    }

    #[test]
    fn nothing_to_do_starts_no_thread() {
        let (ram, _file) = ram();
        let (mail, _mailbox) = Mailbox::new().unwrap();
        assert!(Plan::default().start(ram, mail, Arc::new(|| panic!("a thread"))).unwrap().is_none());
    }
}
