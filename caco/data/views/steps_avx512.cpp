// The steps of a view for processors with AVX-512; views.h says which headers have to come before the pragma.

#include "views.h"

#ifdef HAS_CHOICE
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
#pragma GCC diagnostic ignored "-Wuninitialized"  // the compiler's own headers cause these warnings
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define WITH_AVX512
#include "steps.h"

namespace views {
MakeView* const make_view_avx512 = make_view;
}

#pragma GCC pop_options
#endif
