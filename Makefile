# Two commands do everything: `make serve` runs the cluster, `make test` passes the tests.
# Each sets up what it needs in .venv on first use, and again when pyproject.toml changes.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin

export PORT ?= 8000
export HOST ?= 127.0.0.1
export DATA_DIR ?= ./.data
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: serve test fuzz soak lint clean simulate-payments pay-in-browser simulate-ledger chaos-ledger mutate-ledger bench-ledger chaos-jobs scale-cluster dashboard check-metrics bench-idle evaluate-proof chaos-cluster chaos-streams drain-node

# FAKE_STRIPE=1 turns payments on, against the fake Stripe of the tests: pay with a fake card.
serve: $(VENV)/.installed
	@exec $(if $(FAKE_STRIPE),$(BIN)/python -m tests.fakestripe.beside) $(BIN)/dream-admin serve

test: $(VENV)/.installed-dev lint
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --no-loadscope-reorder

# The property tests with new examples, many more of them: tens of minutes.
fuzz: $(VENV)/.installed-dev
	HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest tests --ignore tests/e2e

# A real cluster under ten minutes of load with 1% of the clients hanging up: nothing may be left over. `make soak MINUTES=60`
MINUTES ?= 10
soak: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.soak --minutes $(MINUTES)

# The ledger's slower proofs and its figures, minutes each.
simulate-ledger chaos-ledger mutate-ledger bench-ledger: $(VENV)/.installed-dev

# Another history each time, unless SEED names one.
simulate-ledger:
	$(BIN)/python -m benchmarks.ledger_simulation --operations 1000000 $(if $(SEED),--seed $(SEED))

chaos-ledger:
	$(BIN)/python -m benchmarks.ledger_chaos --kills 1000
	$(BIN)/python -m benchmarks.ledger_outages --outages 20

mutate-ledger:
	$(BIN)/python -m benchmarks.ledger_mutations

bench-ledger:
	$(BIN)/python -m benchmarks.ledger
	$(BIN)/python -m benchmarks.ledger_actor

# A month of payments in a world in which every part fails; the books must agree to the cent.
simulate-payments: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.payments_simulation --customers 200 --days 30

# Has a headless Chromium pay on the fake Stripe's page; `apt-get install chromium` first.
pay-in-browser: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.pay_in_browser
# Async rollouts on a cluster whose processes are killed, a minute or two.
chaos-jobs: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.job_chaos

# Ray's autoscaler adds GPU nodes under load and takes them away after it, on one machine: two minutes.
scale-cluster: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.cluster_autoscaling

# Head and GPU node killed, model and limits replaced by `serve deploy`, all under load: four minutes, and wants
# `apt-get install redis-server`.
chaos-cluster: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.cluster_faults

# Replicas of the causal student are killed under sessions, two runs of a minute each: the same pixels arrive.
chaos-streams: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.stream_chaos --sessions 1 --quiet
	$(BIN)/python -m benchmarks.stream_chaos

# The node of a serving replica is drained and ends; a minute or two.
drain-node: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.node_drain

# CPU and memory of each process of a cluster that nobody uses: two minutes.
bench-idle: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.idle

# After a change of serve_app/dashboard.py.
dashboard: $(VENV)/.installed-dev
	$(BIN)/python -m serve_app.dashboard > serve_app/config/dashboard.json

# The alert rules by promtool, and a real Prometheus that scrapes a real cluster; `apt-get install prometheus` first.
check-metrics: $(VENV)/.installed-dev
	promtool check rules serve_app/config/alerts.yaml
	promtool test rules tests/serve_app/alerts_test.yaml
	$(BIN)/python -m benchmarks.scrape

# An evaluation by `ray job submit`, killed twice; and its throughput beside a bare loop. Ten minutes on two quiet cores.
evaluate-proof: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.evaluation $(if $(SEED),--seed $(SEED))

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, found " + sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml $(VENV)/bin/python
	@echo 'installing into $(VENV); the first time takes a minute or two' >&2
	@$(BIN)/pip install --quiet --editable . >&2
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/bin/python
	@echo 'installing into $(VENV); the first time takes a minute or two' >&2
	@$(BIN)/pip install --quiet --editable '.[dev]' >&2
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV)
