//! What the VMM refuses to build, and in which words.

mod common;

use std::fs::File;
use std::io::{Seek, Write};

use common::{guest, Setup};

fn file(content: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_text_file_is_no_kernel() {
    let message = Setup::new(file(b"#!/bin/sh\necho hello\n")).refused();
    assert!(message.ends_with("the kernel is neither a bzImage nor an ELF file for x86-64"), "{message}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn an_initrd_that_does_not_fit_is_named_with_sizes() {
    let initrd = tempfile::tempfile().unwrap();
    initrd.set_len(100 << 20).unwrap();
    let message = Setup::new(guest("hello")).initrd(initrd).refused();
    assert!(message.contains("the initrd (100 MiB) does not fit") && message.contains("64 MiB"), "{message}");
    assert!(message.ends_with("raise --memory"), "{message}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_file_that_is_not_dev_kvm_is_refused() {
    let mut setup = Setup::new(guest("hello"));
    setup.fds[0] = File::open("/dev/null").unwrap().into();
    assert!(setup.refused().contains("the descriptor passed for /dev/kvm speaks KVM version"));
}

#[test]
#[ignore = "needs /dev/kvm"]
fn an_answer_of_kvm_that_is_none_is_refused() {
    let mut setup = Setup::new(guest("hello"));
    setup.fds[1] = File::open("/dev/null").unwrap().into();
    let message = setup.refused();
    assert!(message.contains("KVM_GET_SUPPORTED_CPUID that was passed cannot be read: it has 0 bytes"), "{message}");
}

#[test]
#[ignore = "needs /dev/kvm"]
fn a_wrong_configuration_is_refused() {
    let message = Setup::new(guest("hello")).memory(1 << 20).refused();
    assert!(message.contains("32 MiB to 1 TiB"), "{message}");
}
