"""The same budget of trials for each loss, on classes that are not the test's."""
