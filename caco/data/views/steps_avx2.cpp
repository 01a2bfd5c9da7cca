// The steps of a view for processors with AVX2; views.h says what comes before the pragma.

#include "views.h"

#ifdef HAS_CHOICE
#pragma GCC push_options
#pragma GCC target("avx2")
#define WITH_AVX2  // __AVX2__ does not follow the pragma
#include "steps.h"

namespace views {
MakeView* const make_view_avx2 = make_view;
}

#pragma GCC pop_options
#endif
