"""What people read: tables beside the published figures, and pages."""
