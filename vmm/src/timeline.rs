//! How long each step of a start took.

use std::time::Instant;

use ovms_proto::control::Timeline;

/// Notes steps as they are passed.
#[derive(Debug)]
pub struct Recorder {
    begin: Instant,
    timeline: Timeline,
}

impl Recorder {
    /// Starts the clock: the first thing that the process does.
    pub fn start() -> Self {
        Self { begin: Instant::now(), timeline: Timeline::default() }
    }

    /// Microseconds since the start.
    pub fn micros(&self) -> u64 {
        u64::try_from(self.begin.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Notes that `step` has been passed.
    pub fn passed(&mut self, step: &str) {
        self.passed_at(step, Instant::now());
    }

    /// Notes that `step` was passed at `at`, on another thread.
    pub fn passed_at(&mut self, step: &str, at: Instant) {
        let micros = u64::try_from(at.saturating_duration_since(self.begin).as_micros()).unwrap_or(u64::MAX);
        let place = self.timeline.steps.partition_point(|(_, earlier)| *earlier <= micros);
        self.timeline.steps.insert(place, (step.to_owned(), micros));
    }

    /// All steps so far.
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }
}
