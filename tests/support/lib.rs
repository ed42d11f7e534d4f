//! What the black-box tests share: bundles, private containerds, the leak check.
