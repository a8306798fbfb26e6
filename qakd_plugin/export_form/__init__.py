"""A trained student as plain torch: toolkits make it, deploy reads it."""
