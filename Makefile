# The menu of the project: `make` lists it.

CARGO ?= cargo
PREFIX ?= /usr/local
HOST := $(shell rustc -vV | sed -n 's/^host: //p')
# One file without a dynamic loader starts in half the time and shares more of its memory; whole pages for its data are fewer.
STATIC = LIBSECCOMP_LINK_TYPE=static LIBSECCOMP_LIB_PATH=$$(dirname $$(cc -print-file-name=libseccomp.a)) \
	RUSTFLAGS="-C target-feature=+crt-static -C relocation-model=static -C link-arg=-Wl,-z,separate-loadable-segments"
# cargo-nextest where it is there: a process per test.
RUN_TESTS := $(if $(shell command -v cargo-nextest),nextest run --no-fail-fast,test --no-fail-fast)

.PHONY: help demo build test test-v2 test-vm test-reference engines bench soak lint audit install

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: build ## run containers with a private containerd and skiff, from nothing to nothing left
	contrib/demo

build: ## the two binaries, statically linked, in target/release
	contrib/install-deps
	$(STATIC) $(CARGO) build --release --target $(HOST) --package skiff --package containerd-shim-skiff --bins
	install -D -t target/release target/$(HOST)/release/skiff target/$(HOST)/release/containerd-shim-skiff-v2

test: ## all tests; as root
	contrib/install-deps --tests
	$(CARGO) $(RUN_TESTS) --workspace

test-v2: ## the tests of the command line and the shim where cgroup v2 alone is mounted, with what v1 leaves to it
	contrib/install-deps --tests
	contrib/v2-view $(CARGO) $(RUN_TESTS) --package skiff --test cli --package containerd-shim-skiff --test shim

test-vm: ## the tests in a virtual machine with systemd and cgroup v2; as root, on Debian; builds its image once
	contrib/install-deps --tests
	contrib/vm

test-reference: ## the black-box tests against runc and the Go shim: what these cannot pass is a wrong test
	contrib/install-deps --tests
	RUNTIME_UNDER_TEST=runc $(CARGO) $(RUN_TESTS) --package skiff --test cli
	SHIM_UNDER_TEST=io.containerd.runc.v2 $(CARGO) $(RUN_TESTS) --package containerd-shim-skiff --test shim --test cri

bench: build ## compare with runc, crun and the Go shim: table, target/bench.json, target/bench.svg
	contrib/install-deps --bench
	cc -O2 -static -o target/floor contrib/bench/floor.c
	$(CARGO) run --release --package skiff-bench -- --json target/bench.json --svg target/bench.svg $(BENCH)

soak: build ## what a shim holds after a thousand containers and ten thousand execs: a table, beside the Go shim's
	contrib/install-deps --bench
	$(CARGO) run --release --package skiff-bench -- soak

engines: build ## run containers with Podman and Docker, installed for it, and skiff as their runtime
	contrib/engines

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
