# Each target sets up what it needs in .venv. Start over with `rm -rf .venv runs/demo`.

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
# Slices of 400 phantom patients are enough for the minutes of training that two cores allow.
PATIENTS := 400
# A network trained at length, where the repository has it: its report of the demo's patients is written too.
SHIPPED := $(wildcard models/phantom64)

.PHONY: demo room test bench bench-training clean

demo: $(DEMO)/report/index.html $(SHIPPED:models/%=$(DEMO)/report-%/index.html) | .venv/serve
	@echo "Open $^"
	@echo "To ask the archive yourself: make room, which is"
	@echo "  $(BIN)/python evaluate.py serve --workdir=$(DEMO)/train --bank=$(DEMO)/banks/reference"

room: $(DEMO)/banks/reference/bank.json | .venv/serve
	$(BIN)/python evaluate.py serve --workdir=$(DEMO)/train --bank=$(DEMO)/banks/reference

test: .venv/test
	$(BIN)/python -m pytest -rs -n auto --dist loadfile -m "not long"

bench: .venv/bench
	$(BIN)/python benchmarks/retrieval.py --write docs/retrieval.md

bench-training: .venv/bench .venv/prep
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/input.py

clean:
	rm -rf .venv runs/demo

.venv/%: setup.cfg
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -e ".[$*]"
	touch $@

$(DEMO)/data/manifest.json: | .venv/prep
	rm -rf $(DEMO)/data
	$(BIN)/python -m data_prep phantom --out $(DEMO)/data --patients $(PATIENTS) --size 64

$(DEMO)/train/done.json: $(DEMO)/data/manifest.json
	$(BIN)/python train.py --config=configs/demo.py --workdir=$(DEMO)/train --config.data.dir=$(DEMO)/data

$(DEMO)/banks/%/bank.json: $(DEMO)/train/done.json
	rm -rf $(DEMO)/banks/$*
	$(BIN)/python evaluate.py encode --workdir=$(DEMO)/train --data=$(DEMO)/data --split=$* --out=$(DEMO)/banks/$*

$(DEMO)/report/index.html: $(DEMO)/train/done.json $(DEMO)/banks/reference/bank.json $(DEMO)/banks/query/bank.json
	$(BIN)/python evaluate.py report --workdir=$(DEMO)/train --data=$(DEMO)/data --out=$(DEMO)/report

$(DEMO)/report-%/index.html: models/%/meta.json $(DEMO)/data/manifest.json
	$(BIN)/python evaluate.py report --workdir=models/$* --data=$(DEMO)/data --out=$(DEMO)/report-$*
