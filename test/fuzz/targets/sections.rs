//! A section of a saved machine behind right checksums, as a forger would write it: the first byte says which of a golden
//! machine's sections the rest takes the place of. Reader, decoders and the VMM's real devices take it, without KVM; what
//! they accept is saved, restored again and let go. `vmm/tests/hostile_state.rs` calls the same entry.
#![no_main]

#[allow(dead_code, reason = "the tests' helpers, of which this is one")]
#[path = "../../../vmm/tests/common/bare.rs"]
mod bare;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    bare::section(input);
});
