# The targets of llmpar, for find_package(llmpar), add_subdirectory and FetchContent alike. Before it is included:
#   llmpar_include_dir    folder of llmpar.h
#   llmpar_components     any of mpi, cuda, nccl: the targets that need another package
# It sets llmpar_<component>_FOUND, and llmpar_<component>_problem where that is FALSE.
#
#   llmpar::llmpar   the header, threads, libm. Define LLMPAR_IMPLEMENTATION in one file of yours, or let
#                    llmpar_add_implementation make a library of the functions
#   llmpar::mpi      ... and LLMPAR_USE_MPI, MPI
#   llmpar::cuda     ... and the CUDA runtime, for llmpar_cuda.h
#   llmpar::nccl     ... and NCCL, for llmpar_nccl.h

get_property(llmpar_languages GLOBAL PROPERTY ENABLED_LANGUAGES)
if("C" IN_LIST llmpar_languages)
    set(llmpar_language C)
elseif("CXX" IN_LIST llmpar_languages)
    set(llmpar_language CXX)
else()
    message(FATAL_ERROR "llmpar: needs the language C or CXX: enable one, with project(... LANGUAGES C) or enable_language(C), before llmpar is looked for")
endif()

set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)

if(NOT TARGET llmpar::llmpar)
    add_library(llmpar::llmpar INTERFACE IMPORTED ${llmpar_scope})
    set_target_properties(llmpar::llmpar PROPERTIES
        INTERFACE_INCLUDE_DIRECTORIES "${llmpar_include_dir}"
        INTERFACE_LINK_LIBRARIES "Threads::Threads;m")
endif()

# A backend's target: llmpar_target(NAME DEFINITIONS LIBRARY...)
macro(llmpar_target name definitions)
    if(NOT TARGET llmpar::${name})
        add_library(llmpar::${name} INTERFACE IMPORTED ${llmpar_scope})
        set_target_properties(llmpar::${name} PROPERTIES
            INTERFACE_COMPILE_DEFINITIONS "${definitions}"
            INTERFACE_LINK_LIBRARIES "llmpar::llmpar;${ARGN}")
    endif()
    set(llmpar_${name}_FOUND TRUE)
endmacro()

foreach(llmpar_component IN LISTS llmpar_components)
    set(llmpar_${llmpar_component}_FOUND FALSE)
    if(llmpar_component STREQUAL "mpi")
        find_package(MPI QUIET COMPONENTS ${llmpar_language})
        if(MPI_${llmpar_language}_FOUND)
            llmpar_target(mpi LLMPAR_USE_MPI MPI::MPI_${llmpar_language})
        else()
            set(llmpar_mpi_problem "no MPI for ${llmpar_language} was found: install Open MPI or MPICH (Debian package libopenmpi-dev or libmpich-dev), or set MPI_HOME or MPI_${llmpar_language}_COMPILER")
        endif()
    elseif(llmpar_component STREQUAL "cuda")
        find_package(CUDAToolkit QUIET)
        if(CUDAToolkit_FOUND)
            llmpar_target(cuda "" CUDA::cudart)
        else()
            set(llmpar_cuda_problem "no CUDA toolkit was found: set CUDAToolkit_ROOT or CUDACXX, or put nvcc into PATH")
        endif()
    elseif(llmpar_component STREQUAL "nccl")
        find_path(LLMPAR_NCCL_INCLUDE_DIR nccl.h HINTS ${NCCL_ROOT} ENV NCCL_ROOT ENV NCCL_HOME PATH_SUFFIXES include)
        find_library(LLMPAR_NCCL_LIBRARY nccl HINTS ${NCCL_ROOT} ENV NCCL_ROOT ENV NCCL_HOME PATH_SUFFIXES lib lib64)
        mark_as_advanced(LLMPAR_NCCL_INCLUDE_DIR LLMPAR_NCCL_LIBRARY)
        find_package(CUDAToolkit QUIET)
        if(NOT LLMPAR_NCCL_INCLUDE_DIR OR NOT LLMPAR_NCCL_LIBRARY)
            set(llmpar_nccl_problem "no NCCL was found (nccl.h and libnccl): set NCCL_ROOT to its folder")
        elseif(NOT CUDAToolkit_FOUND)
            set(llmpar_nccl_problem "NCCL needs the CUDA toolkit, which was not found: set CUDAToolkit_ROOT or CUDACXX, or put nvcc into PATH")
        else()
            llmpar_target(nccl "" "${LLMPAR_NCCL_LIBRARY};CUDA::cudart")
            set_target_properties(llmpar::nccl PROPERTIES INTERFACE_INCLUDE_DIRECTORIES "${LLMPAR_NCCL_INCLUDE_DIR}")
        endif()
    else()
        set(llmpar_${llmpar_component}_problem "there is no such component, expected mpi, cuda or nccl")
    endif()
endforeach()

# llmpar_add_implementation(NAME [LINK llmpar::mpi ...] [DEFINITIONS LLMPAR_NO_IO ...])
# A static library NAME that holds the functions, compiled once and at -O3 in every build type (the kernels are in it). Who links NAME gets what LINK
# names, llmpar::llmpar included, and must not define LLMPAR_IMPLEMENTATION.
function(llmpar_add_implementation name)
    cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "LINK;DEFINITIONS")
    if(arg_UNPARSED_ARGUMENTS)
        message(FATAL_ERROR "llmpar_add_implementation(${name}): got ${arg_UNPARSED_ARGUMENTS}, expected [LINK target...] [DEFINITIONS macro...]")
    endif()
    get_property(languages GLOBAL PROPERTY ENABLED_LANGUAGES)
    set(suffix cc)
    if("C" IN_LIST languages)
        set(suffix c)
    endif()
    set(source "${CMAKE_CURRENT_BINARY_DIR}/${name}.${suffix}")
    file(GENERATE OUTPUT "${source}" CONTENT "#define LLMPAR_IMPLEMENTATION\n#include \"llmpar.h\"\n")
    add_library(${name} STATIC "${source}")
    target_compile_options(${name} PRIVATE -O3)
    target_compile_definitions(${name} PRIVATE ${arg_DEFINITIONS})
    target_link_libraries(${name} PUBLIC llmpar::llmpar ${arg_LINK})
endfunction()
