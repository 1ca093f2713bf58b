# make setup   .venv with everything the scripts need       make demo   the whole story on embedded data, on CPU
# make test    the checks and tests that CI runs            make slow   the other tests: whole commands, many processes
# make tables  every experiment at demo scale            make clean  removes .venv
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo tables test slow clean

setup: .venv/.runtime

demo: .venv/.runtime
	$(BIN)/python demo.py

tables: .venv/.runtime
	$(BIN)/python reproduce.py experiments/*.yaml --scale demo --jobs 2

test: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

slow: .venv/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m slow

clean:
	rm -rf .venv

.venv/.runtime: requirements.txt
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
	  { rm -rf .venv; echo "error: $(PYTHON) cannot make a virtual environment: apt-get install python3-venv" >&2; exit 2; }
	$(BIN)/pip install --quiet --requirement requirements.txt
	@touch $@

.venv/.dev: requirements-dev.txt requirements-export.txt requirements-serve.txt .venv/.runtime
	$(BIN)/pip install --quiet --requirement requirements-dev.txt
	@touch $@
