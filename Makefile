# Needs Python >= 3.11 with pip, and make; everything else lands in .venv.
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2
STAMP := .venv/setup.stamp
START := $(shell date +%s)

.PHONY: setup demo test check bench faults fuzz lint models
.DEFAULT_GOAL := setup

setup: $(STAMP)

# torch goes first, so that the pinned build is there before anything that depends on torch.
# Some distributions ship pip but not ensurepip: then the pip outside fills the environment.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.version_info >= (3, 11) or sys.exit("PYTHON: version must be at least 3.11, got " + v + ". Run make PYTHON=python3.11.")'
	test -x $(PY) && $(PY) -m pip --version || $(PYTHON) -m venv --clear .venv || \
		{ $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(PY) install pip; }
	$(PIP) torch setuptools
	$(PIP) --no-build-isolation --use-pep517 -e '.[factory,report,dev]'
	@touch $@

demo: setup
	$(PY) -m kvsmith.pipeline.demo

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy -p kvsmith

test: lint
	@$(PYTEST) -m "not gpu and not network"; code=$$?; \
		echo "make test: $$(( $$(date +%s) - $(START) )) s in all"; exit $$code

check: lint
	$(PYTEST) -m "not slow and not gpu and not network"

# Rewrites docs/MODELS.md from what the architecture tests measure.
models: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/runtime/test_architectures.py --models-page -q

# A million damaged bundles (about 20 minutes). A seed repeats them: make fuzz SEED=7 FIRST=12000.
FIRST ?= 0
COUNT ?= 1000000
fuzz: setup
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz --first $(FIRST) --count $(COUNT) $(if $(SEED),--seed $(SEED))

# Kills calibration and export at 200 places; `make test` does it at 20.
faults: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/faults --kills 200 -s

bench: setup
	$(PY) -m kvsmith.pipeline.fit.bench
	$(PY) -W ignore -m kvsmith.pipeline.bench_decode
	$(PY) -W ignore -m kvsmith.pipeline.bench_evict
