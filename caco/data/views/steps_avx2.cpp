// The steps of a view for processors with AVX2; views.h says which headers have to come before the pragma.

#include "views.h"

#ifdef HAS_CHOICE
#pragma GCC push_options
#pragma GCC target("avx2")
#define WITH_AVX2  // the pragma does not define __AVX2__
#include "steps.h"

namespace views {
MakeView* const make_view_avx2 = make_view;
}

#pragma GCC pop_options
#endif
