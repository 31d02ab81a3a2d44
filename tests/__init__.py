"""A package, so that test files and the processes that they launch can import `tests.helpers`."""
