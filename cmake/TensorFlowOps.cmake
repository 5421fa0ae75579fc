# TensorFlow's ops, in a library of their own: hvd_backup/tensorflow/ops-VERSION.so, named after the TensorFlow that it
# was compiled against and fits. Sets tensorflow_ops, for the summary. They link no core: that of the module _core is
# handed to them (hvdb_function_table).

set(tensorflow_ops "none: TensorFlow is not installed for this Python (or hidden by build isolation)")
set(tensorflow_facts "")
if(HVD_BACKUP_TENSORFLOW STREQUAL "OFF")
  set(tensorflow_ops "none: HVD_BACKUP_TENSORFLOW=OFF")
else()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/tensorflow_facts.py"
    OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE tensorflow_facts ERROR_VARIABLE tensorflow_error
    RESULT_VARIABLE tensorflow_status)
  if(NOT tensorflow_status EQUAL 0)
    set(tensorflow_facts "")
    if(HVD_BACKUP_TENSORFLOW STREQUAL "ON")
      message(FATAL_ERROR "HVD_BACKUP_TENSORFLOW=ON, but there is no usable TensorFlow: ${tensorflow_error}\n"
        "`pip install tensorflow-cpu` into the environment of ${Python_EXECUTABLE}, and build without isolation "
        "(pip install --no-build-isolation .), or use HVD_BACKUP_TENSORFLOW=AUTO.")
    endif()
  endif()
endif()

if(tensorflow_facts)
  list(POP_FRONT tensorflow_facts tensorflow_version tensorflow_standard)
  set(tensorflow_compile_flags "${tensorflow_facts}")
  list(FILTER tensorflow_compile_flags EXCLUDE REGEX "^-[lLI]")
  set(tensorflow_link_flags "${tensorflow_facts}")
  list(FILTER tensorflow_link_flags INCLUDE REGEX "^-[lL]")
  set(tensorflow_includes "${tensorflow_facts}")
  list(FILTER tensorflow_includes INCLUDE REGEX "^-I")
  list(TRANSFORM tensorflow_includes REPLACE "^-I" "")
  file(GLOB tensorflow_sources CONFIGURE_DEPENDS csrc/bindings/tensorflow*.cpp)
  add_library(tensorflow_ops MODULE ${tensorflow_sources})
  target_link_libraries(tensorflow_ops PRIVATE hvd_backup_flags Threads::Threads ${tensorflow_link_flags})
  target_include_directories(tensorflow_ops SYSTEM PRIVATE ${tensorflow_includes})
  target_compile_options(tensorflow_ops PRIVATE ${tensorflow_compile_flags})
  set_target_properties(tensorflow_ops PROPERTIES
    PREFIX "" OUTPUT_NAME "ops-${tensorflow_version}"
    CXX_STANDARD ${tensorflow_standard} # as TensorFlow itself, for one layout of what its headers define
    INSTALL_RPATH_USE_LINK_PATH OFF) # TensorFlow is loaded before it
  install(TARGETS tensorflow_ops LIBRARY DESTINATION hvd_backup/tensorflow)
  set(tensorflow_ops "TensorFlow ${tensorflow_version}")
endif()
