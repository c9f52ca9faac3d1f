# Every command of the project. `make help` lists them.

PREFIX ?= /usr/local
DESTDIR ?=
E2E ?= auto
CASE ?= *
CONTAINERD ?=
FUZZ_SECONDS ?= 20
CARGO ?= cargo
BUILT ?= target/release
CARGO_DENY := 0.20.2

BINARIES := ovm ovm-transfer ovms-vmm ovms-snapshotter containerd-shim-ovms-v1
export DEBIAN_FRONTEND = noninteractive

.DEFAULT_GOAL := help
.PHONY: help deps build install uninstall guests suite demo test test-kvm e2e bench lint fmt layers house deny fuzz-smoke clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

deps: ## Install the Debian packages and cargo tools that build and tests need (root)
	@for tool in $(CARGO) go; do command -v $$tool >/dev/null || \
		{ echo "deps: $$tool is not in PATH: install Rust 1.95 (rustup, with rustfmt and clippy) and Go 1.26" >&2; exit 1; }; done
	test/testbed/packages
	@command -v cargo-deny >/dev/null || $(CARGO) install --locked --quiet cargo-deny@$(CARGO_DENY)

# Two are linked statically: docs/adr/0013-static-vmm.md, docs/adr/0014-two-programs.md.
build: ## Build the programs into target/release
	$(CARGO) build --release --locked --workspace --exclude ovms-vmm --exclude ovms-cli
	$(CARGO) build --release --locked --package ovms-cli --bin ovm-transfer
	$(CARGO) rustc --release --locked --package ovms-vmm --bin ovms-vmm -- -C target-feature=+crt-static
	$(CARGO) rustc --release --locked --package ovms-cli --bin ovm -- -C target-feature=+crt-static

install: build ## Install programs, settings, containerd snippet and systemd units below DESTDIR and PREFIX
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)/etc/ovms $(DESTDIR)/lib/systemd/system $(DESTDIR)$(PREFIX)/share/ovms
	install -m 0755 $(BINARIES:%=$(BUILT)/%) $(DESTDIR)$(PREFIX)/bin/
	test -e $(DESTDIR)/etc/ovms/ovms.toml || install -m 0644 config/ovms.toml $(DESTDIR)/etc/ovms/ovms.toml
	install -m 0644 config/containerd/*.toml $(DESTDIR)$(PREFIX)/share/ovms/
	for unit in config/systemd/*; do sed 's|/usr/local/bin|$(PREFIX)/bin|' $$unit > $(DESTDIR)/lib/systemd/system/$${unit##*/}; done

uninstall: ## Remove what install has put there, but not settings or state
	rm -f $(BINARIES:%=$(DESTDIR)$(PREFIX)/bin/%)
	rm -f $(patsubst config/systemd/%,$(DESTDIR)/lib/systemd/system/%,$(wildcard config/systemd/*))
	rm -rf $(DESTDIR)$(PREFIX)/share/ovms

guests: ## Build the bare-metal test guests into target/guests
	$(MAKE) -s -C test/guests

demo: build ## Build, push, pull and run a Debian machine under a private containerd
	test/demo/run

test: ## Run the tests that need neither root nor KVM
	PATH="$$(python3 test/testbed/tools --path oras):$$PATH" $(CARGO) test --workspace --locked

test-kvm: build guests ## Run the tests that need root and /dev/kvm (bare-metal guests)
	$(CARGO) test --workspace --locked -- --ignored --test-threads=2 --skip stock_kernel_

suite: ## Build containerd's own snapshotter test suite, the tests' containerd client, the VMM's tests of a stock kernel
	cd test/snapshotter-suite && CGO_ENABLED=0 go test -c -trimpath -o ../../target/e2e/snapshotter-suite .
	cd test/snapshotter-suite && CGO_ENABLED=0 go build -trimpath -o ../../target/e2e/samedisk ./samedisk
	cp "$$($(CARGO) test --locked --package ovms-vmm --test linux --no-run --message-format=json-render-diagnostics \
		| test/e2e/executable linux)" target/e2e/vmm-linux

e2e: build guests suite ## Run the end-to-end cases: E2E=auto|native|nested|direct CASE=glob CONTAINERD='2.4 2.3 2.1 1.7'
	E2E='$(E2E)' CASE='$(CASE)' CONTAINERD='$(CONTAINERD)' python3 test/e2e/run.py

bench: build guests ## Measure each promise beside its floor; writes target/bench/report.json
	python3 test/bench/run.py

lint: fmt layers house deny ## Check format, clippy, crate graph, house rules and dependencies
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

fmt: ## Check the format of the code
	$(CARGO) fmt --all --check

layers: ## Compare docs/layers.txt with the crate graph
	python3 test/lint/layers.py

house: ## Check the house rules: file length, unsafe walls
	python3 test/lint/house.py

deny: ## Check licenses, bans and sources of all dependencies
	cargo deny --log-level error check bans licenses sources

fuzz-smoke: ## Run every fuzz target for FUZZ_SECONDS
	FUZZ_SECONDS=$(FUZZ_SECONDS) test/fuzz/smoke

clean: ## Remove what was built
	$(CARGO) clean
