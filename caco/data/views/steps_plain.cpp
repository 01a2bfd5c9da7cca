// The steps of a view for any processor.

#include "views.h"
#include "steps.h"

namespace views {
MakeView* const make_view_plain = make_view;
}
