"""What more than one test file needs and is no fixture: `from tests.helpers.trainers import TRAINERS`."""
