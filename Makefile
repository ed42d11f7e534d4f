# The menu of the project: `make` lists it.

CARGO ?= cargo
PREFIX ?= /usr/local
# cargo-nextest where it is there: a process per test.
RUN_TESTS := $(if $(shell command -v cargo-nextest),nextest run --no-fail-fast,test --no-fail-fast)

.PHONY: help demo build test test-vm test-reference lint audit install

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: ## run containers with a private containerd and skiff, from nothing to nothing left
	contrib/install-deps
	$(CARGO) build --release --workspace --bins
	contrib/demo

build: ## the two binaries, in target/release
	contrib/install-deps
	$(CARGO) build --release --workspace --bins

test: ## all tests; as root
	contrib/install-deps --tests
	$(CARGO) $(RUN_TESTS) --workspace

test-vm: ## the tests in a virtual machine with systemd and cgroup v2; as root, on Debian; builds its image once
	contrib/install-deps --tests
	contrib/vm

test-reference: ## the black-box tests against runc and the Go shim: what these cannot pass is a wrong test
	contrib/install-deps --tests
	RUNTIME_UNDER_TEST=runc $(CARGO) $(RUN_TESTS) --package skiff --test cli
	SHIM_UNDER_TEST=io.containerd.runc.v2 $(CARGO) $(RUN_TESTS) --package containerd-shim-skiff --test shim

lint: ## rustfmt, clippy with warnings as errors, cargo-deny
	contrib/install-deps
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	command -v cargo-deny >/dev/null || $(CARGO) install --locked cargo-deny
	$(CARGO) deny --log-level error check bans licenses sources

audit: ## cargo-deny's advisories; fetches their database
	$(CARGO) deny --log-level error check advisories

install: build ## the binaries into PREFIX/bin (/usr/local/bin)
	install -m 755 target/release/skiff target/release/containerd-shim-skiff-v2 $(DESTDIR)$(PREFIX)/bin/
