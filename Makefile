# `make demo` and `make test` are all a fresh machine needs: each fills .venv first if it is missing or out of date.
PYTHON ?= python3
BIN := .venv/bin
CONSTRAINTS := launch/constraints/cpu.txt
STAMP := .venv/.filled

.PHONY: setup demo test lint bench reference newest picture simulate
setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@echo "setup: fills .venv with what the demo and the tests need: PyTorch and vLLM for the CPU, TRL; for tests alone Ray,"
	@echo "setup: DeepSpeed, mergekit, textarena, trackio. Some GB, one to four minutes with a near index; PyTorch's CPU build is"
	@echo "setup: on https://download.pytorch.org/whl/cpu (PIP_EXTRA_INDEX_URL names it)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python tests/fill.py
	@touch $@

demo: $(STAMP)
	$(BIN)/polyphony demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadscope --no-loadscope-reorder

lint: $(STAMP)
	@# no type checker follows an editable install: it reads these links
	mkdir -p build/polyphony && ln -sfn ../../curricula ../../launch ../../rewards ../../trainer build/polyphony/
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/lint-imports

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks.run

# launch/REFERENCE.md, from the declarations in the code
reference: $(STAMP)
	$(BIN)/python -m tests.reference

# rollout workers by a model, beside two real ones and up to 64 that sleep
simulate: $(STAMP)
	$(BIN)/python -m tests.experiments.simulate

# what is newest together, in an environment beside (build/newest): what is other than tested, and what of the fast tests breaks
newest: $(STAMP)
	$(BIN)/python -m tests.experiments.newest

# what the README shows: the first screen of the report of `make demo`
RUN ?= runs/demo/run
CHROMIUM ?= $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
picture: $(STAMP)
	@test -n "$(CHROMIUM)" || { echo "no Chromium found: install one (apt-get install chromium) or give CHROMIUM=/its/path"; exit 1; }
	@test -d $(RUN) || { echo "no run in $(RUN): make demo first, or give RUN=another"; exit 1; }
	mkdir -p build && $(BIN)/polyphony report $(RUN) --out build/picture.html
	$(CHROMIUM) --headless --no-sandbox --hide-scrollbars --window-size=1200,1400 \
		--screenshot=launch/report/demo.png file://$(CURDIR)/build/picture.html
